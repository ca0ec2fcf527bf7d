//! Pictures of matrices and curves: a scene of rectangles, lines, images and texts, written as PNG or as SVG.
//!
//! It uses nothing of the program but `text`, so that the examples take the folder as it is.

mod font;
pub(crate) mod heat;
mod legend;
mod raster;
pub(crate) mod scale;
pub(crate) mod scene;
mod svg;
