//! A scene as pixels, and those as PNG.

use std::io;

use tiny_skia::{FilterQuality, LineCap, LineJoin, Paint, PathBuilder, Pixmap, PixmapPaint, Stroke, Transform};

use super::font;
use super::scene::{Anchor, Color, Image, Item, MAX_PIXELS, PAPER, Scene, Style};

/// The file.
///
/// # Errors
/// A picture of no pixels, or of more than [`MAX_PIXELS`].
pub(crate) fn png(scene: &Scene) -> io::Result<Vec<u8>> {
    let [width, height] = scene.size;
    let rgb = pixels(scene)?.pixels;
    let mut bytes = vec![];
    let side = |n: usize| u32::try_from(n).map_err(io::Error::other);
    let mut encoder = png::Encoder::new(&mut bytes, side(width)?, side(height)?);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.write_header()?.write_image_data(&rgb)?;
    Ok(bytes)
}

/// A scene drawn.
pub(crate) fn pixels(scene: &Scene) -> io::Result<Image> {
    let [width, height] = scene.size;
    let mut map = pixmap(width, height)?;
    let [red, green, blue] = PAPER;
    map.fill(tiny_skia::Color::from_rgba8(red, green, blue, 255));
    scene.items.iter().try_for_each(|item| draw(&mut map, item))?;
    let mut pixels = Vec::with_capacity(3 * width * height);
    pixels.extend(map.pixels().iter().flat_map(|pixel| [pixel.red(), pixel.green(), pixel.blue()]));
    Ok(Image { size: scene.size, pixels })
}

fn pixmap(width: usize, height: usize) -> io::Result<Pixmap> {
    let refused = || io::Error::other(format!("{width} x {height} pixels, needs 1 to {MAX_PIXELS} of them"));
    if width.checked_mul(height).is_none_or(|pixels| pixels > MAX_PIXELS) {
        return Err(refused());
    }
    let side = |n: usize| u32::try_from(n).map_err(io::Error::other);
    Pixmap::new(side(width)?, side(height)?).ok_or_else(refused)
}

fn draw(map: &mut Pixmap, item: &Item) -> io::Result<()> {
    match item {
        Item::Rect { at: [x, y], size: [width, height], color } => {
            let rect = tiny_skia::Rect::from_xywh(single(*x), single(*y), single(*width), single(*height));
            if let Some(rect) = rect {
                map.fill_rect(rect, &paint(*color), Transform::identity(), None);
            }
        }
        Item::Line { points, color, width } => {
            let mut path = PathBuilder::new();
            for (n, [x, y]) in points.iter().enumerate() {
                // a line of one pixel lies in the middle of pixels, or it would be a faint one of two
                let half = if *width < 1.5 { 0.5 } else { 0.0 };
                let (x, y) = (single(x + half), single(y + half));
                if n == 0 { path.move_to(x, y) } else { path.line_to(x, y) }
            }
            let stroke = Stroke {
                width: single(*width),
                line_cap: LineCap::Square,
                line_join: LineJoin::Miter,
                ..Stroke::default()
            };
            if let Some(path) = path.finish() {
                map.stroke_path(&path, &paint(*color), &stroke, Transform::identity(), None);
            }
        }
        Item::Dot { at: [x, y], across, color } => {
            if let Some(path) = PathBuilder::from_circle(single(*x), single(*y), single(across / 2.0)) {
                let whole = Transform::identity();
                map.fill_path(&path, &paint(*color), tiny_skia::FillRule::Winding, whole, None);
            }
        }
        Item::Image { at, size, image } => draw_image(map, *at, *size, image)?,
        Item::Text { at, text, style } => draw_text(map, *at, text, *style),
    }
    Ok(())
}

fn draw_image(map: &mut Pixmap, [x, y]: [f64; 2], size: [f64; 2], image: &Image) -> io::Result<()> {
    let mut source = pixmap(image.size[0], image.size[1])?;
    for (to, from) in source.data_mut().as_chunks_mut::<4>().0.iter_mut().zip(image.pixels.as_chunks::<3>().0) {
        *to = [from[0], from[1], from[2], 255];
    }
    let [across, down] = [0, 1].map(|axis| single(size[axis] / image.size[axis] as f64));
    let place = Transform::from_row(across, 0.0, 0.0, down, single(x), single(y));
    let paint = PixmapPaint { quality: FilterQuality::Nearest, ..PixmapPaint::default() };
    map.draw_pixmap(0, 0, source.as_ref(), &paint, place, None);
    Ok(())
}

#[expect(clippy::cast_possible_truncation, reason = "places in a picture")]
fn draw_text(map: &mut Pixmap, [x, y]: [f64; 2], text: &str, style: Style) {
    let laid = font::lay(text);
    let left = match style.anchor {
        Anchor::Start => x,
        Anchor::Middle => x - laid.width as f64 / 2.0,
        Anchor::End => x - laid.width as f64,
    };
    let (left, top) = (left.round() as i64, (y - font::HEIGHT as f64 / 2.0).round() as i64);
    let (width, height) = (i64::from(map.width()), i64::from(map.height()));
    let [red, green, blue] = style.color;
    let Some(color) = tiny_skia::PremultipliedColorU8::from_rgba(red, green, blue, 255) else { return };
    let pixels = map.pixels_mut();
    for (glyph, at) in laid.letters {
        for (row, column) in (0..font::HEIGHT).flat_map(|row| (0..glyph.get_width()).map(move |column| (row, column))) {
            if !glyph.get_pixel(column, row) {
                continue;
            }
            // bold letters are drawn twice, a pixel apart
            for shift in 0..=usize::from(style.bold) {
                let (x, y) = (left + (at + column + shift) as i64, top + row as i64);
                if (0..width).contains(&x)
                    && (0..height).contains(&y)
                    && let Some(pixel) = usize::try_from(y * width + x).ok().and_then(|at| pixels.get_mut(at))
                {
                    *pixel = color;
                }
            }
        }
    }
}

fn paint(color: Color) -> Paint<'static> {
    let mut paint = Paint::default();
    paint.set_color_rgba8(color[0], color[1], color[2], 255);
    paint
}

#[expect(clippy::cast_possible_truncation, reason = "places in a picture")]
const fn single(place: f64) -> f32 {
    place as f32
}
