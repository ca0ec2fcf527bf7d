//! A scene as SVG: its letters are texts, which the viewer's fonts draw, and its matrices are images inside the file.

use std::fmt::Write;
use std::io;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::raster;
use super::scene::{Anchor, Color, Image, Item, PAPER, Scene, Style};

/// What every picture starts with.
pub(crate) const START: &str = "<svg xmlns=\"http://www.w3.org/2000/svg\" data-creator=\"cross-attention\"";

/// Of which a letter is as wide as in the layout, about.
const FONT: &str = "font-family=\"'DejaVu Sans Mono', Menlo, Consolas, monospace\" font-size=\"13.3\"";

/// The file.
///
/// # Errors
/// An image inside of no pixels, or of more than can be written.
pub(crate) fn svg(scene: &Scene) -> io::Result<String> {
    let [width, height] = scene.size;
    let mut text = format!(
        "{START} width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" {FONT}>\n<title>{}</title>\n\
         <rect width=\"100%\" height=\"100%\" fill=\"{}\"/>\n",
        escaped(&scene.title),
        hex(PAPER),
    );
    scene.items.iter().try_for_each(|item| write_item(&mut text, item))?;
    text.push_str("</svg>\n");
    Ok(text)
}

fn write_item(text: &mut String, item: &Item) -> io::Result<()> {
    // writing to a String cannot fail
    let _ = match item {
        Item::Rect { at: [x, y], size: [width, height], color } => {
            writeln!(
                text,
                "<rect x=\"{x:.2}\" y=\"{y:.2}\" width=\"{width:.2}\" height=\"{height:.2}\" fill=\"{}\"/>",
                hex(*color)
            )
        }
        Item::Line { points, color, width } => {
            let points: Vec<String> = points.iter().map(|[x, y]| format!("{x:.2},{y:.2}")).collect();
            writeln!(
                text,
                "<polyline points=\"{}\" fill=\"none\" stroke=\"{}\" stroke-width=\"{width}\" stroke-linecap=\"square\"/>",
                points.join(" "),
                hex(*color)
            )
        }
        Item::Dot { at: [x, y], across, color } => {
            writeln!(text, "<circle cx=\"{x:.2}\" cy=\"{y:.2}\" r=\"{}\" fill=\"{}\"/>", across / 2.0, hex(*color))
        }
        Item::Image { at: [x, y], size: [width, height], image } => {
            writeln!(
                text,
                "<image x=\"{x:.2}\" y=\"{y:.2}\" width=\"{width:.2}\" height=\"{height:.2}\" preserveAspectRatio=\"none\" \
                 style=\"image-rendering:pixelated\" href=\"data:image/png;base64,{}\"/>",
                STANDARD.encode(png(image)?)
            )
        }
        Item::Text { at: [x, y], text: line, style } => {
            let Style { anchor, color, bold } = style;
            let anchor = match anchor {
                Anchor::Start => "start",
                Anchor::Middle => "middle",
                Anchor::End => "end",
            };
            let bold = if *bold { " font-weight=\"bold\"" } else { "" };
            // from the middle of the height to the line that letters stand on
            let (y, color, line) = (y + 4.5, hex(*color), escaped(line));
            writeln!(
                text,
                "<text x=\"{x:.2}\" y=\"{y:.2}\" text-anchor=\"{anchor}\" fill=\"{color}\"{bold}>{line}</text>"
            )
        }
    };
    Ok(())
}

fn png(image: &Image) -> io::Result<Vec<u8>> {
    let size = image.size.map(|side| side as f64);
    let mut scene = Scene { size: image.size, ..Scene::default() };
    scene.image([0.0; 2], size, image.clone());
    raster::png(&scene)
}

fn hex([red, green, blue]: Color) -> String {
    format!("#{red:02x}{green:02x}{blue:02x}")
}

/// Without what XML takes for its own, and without what it does not take at all.
fn escaped(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for char in text.chars() {
        match char {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\u{fffe}' | '\u{ffff}' => escaped.push('\u{fffd}'),
            char => escaped.push(char),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_no_markup() {
        let mut scene = Scene::new("a < b");
        scene.size = [10, 10];
        scene.text("<script>&\u{1b}\u{ffff}", [1.0, 2.0], Style::plain(Anchor::End));
        let text = svg(&scene).unwrap();
        assert!(text.starts_with(START) && text.contains("<title>a &lt; b</title>"), "{text}");
        assert!(text.contains(">&lt;script&gt;&amp;\\u001b\u{fffd}</text>"), "{text}");
    }
}
