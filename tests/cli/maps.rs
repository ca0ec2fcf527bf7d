//! Maps as pictures: what colors mean, what is cut and scaled down, which letters are drawn.

#![expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "colors, 0 to 255")]

use std::fs;

use safetensors::tensor::Dtype;

use super::{Folder, Tensor, WHISPER, bad, f32s, good, program};

const NOT_A_NUMBER: [u8; 3] = [0, 200, 200];
const NO_KEY: [u8; 3] = [176; 3];
const BRIGHTEST: [u8; 3] = [252, 248, 176];

/// Width, height, and red, green and blue of each pixel.
fn pixels(path: &str) -> ([usize; 2], Vec<[u8; 3]>) {
    let decoder = png::Decoder::new(std::io::Cursor::new(fs::read(path).unwrap()));
    let mut reader = decoder.read_info().unwrap();
    let mut bytes = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut bytes).unwrap();
    assert_eq!((info.color_type, info.bit_depth), (png::ColorType::Rgb, png::BitDepth::Eight));
    ([info.width as usize, info.height as usize], bytes.as_chunks().0.to_vec())
}

/// Draws a file as PNG and as SVG.
fn draw(folder: &Folder, input: &str, flags: &[&str]) -> (Vec<[u8; 3]>, String) {
    let [png, svg] = ["map.png", "map.svg"].map(|name| {
        let output = folder.at(name);
        good(&[&["map", input, "--out", &output, "--device", "cpu"], flags].concat());
        output
    });
    (pixels(&png).1, fs::read_to_string(svg).unwrap())
}

fn count(pixels: &[[u8; 3]], color: [u8; 3]) -> usize {
    pixels.iter().filter(|pixel| **pixel == color).count()
}

/// Two heads, and four rows with these weights of four keys: known ones, equal ones, NaN, and no key at all.
fn known() -> Vec<Tensor> {
    let rows: [[f32; 4]; 4] = [[0.97, 0.01, 0.01, 0.01], [0.25; 4], [f32::NAN; 4], [0.25; 4]];
    vec![
        f32s("query", &[1, 2, 4, 4], |at| rows[at / 4 % 4][at % 4].ln() * if at < 16 { 1.0 } else { 0.5 }),
        f32s("key", &[1, 2, 4, 4], |at| if at / 4 % 4 == at % 4 { 1.0 } else { 0.0 }),
        f32s("value", &[1, 2, 4, 4], |_| 1.0),
        ("mask", Dtype::BOOL, vec![4, 4], (0..16).map(|at| u8::from(at < 12)).collect()),
    ]
}

#[test]
fn colors_mean_what_the_legend_says() {
    let folder = Folder::new();
    let input = folder.write("known.safetensors", &known(), &[("scale", "1")]);
    let shade = |from: [f32; 3], to: [f32; 3], part: f32| [0, 1, 2].map(|n| (from[n] + part * (to[n] - from[n])) as u8);
    // 0.25 of 0.97 is this far up the five steps of the colors
    let quarter = [
        ("linear", "linear scale", shade([48.0, 24.0, 104.0], [136.0, 36.0, 112.0], 5.0 * 0.25 / 0.97 - 1.0)),
        (
            "sqrt",
            "square-root scale",
            shade([136.0, 36.0, 112.0], [216.0, 72.0, 72.0], 5.0 * (0.25f32 / 0.97).sqrt() - 2.0),
        ),
        (
            "log",
            "logarithmic scale",
            shade([216.0, 72.0, 72.0], [248.0, 152.0, 40.0], 5.0 * 25f32.ln() / 97f32.ln() - 3.0),
        ),
    ];
    for (flag, name, color) in quarter {
        let (pixels, svg) = draw(&folder, &input, &["--heads", "0", "--color-scale", flag]);
        // a cell has 28 x 28 pixels, and the legend a square of 12 x 12
        assert_eq!(count(&pixels, NOT_A_NUMBER), 4 * 28 * 28 + 12 * 12, "{flag}");
        assert_eq!(count(&pixels, NO_KEY), 4 * 28 * 28 + 12 * 12, "{flag}");
        let near = |pixel: &&[u8; 3]| pixel.iter().zip(color).all(|(a, b)| a.abs_diff(b) <= 1);
        assert!(pixels.iter().filter(near).count() >= 4 * 28 * 28, "{flag}: {color:?}");
        assert!(count(&pixels, BRIGHTEST) >= 28 * 28, "{flag}");
        for text in
            [&format!("weight, {name}"), ">0.97<", ">no finite number (NaN)<", ">row sees no key<", ">query<", ">key<"]
        {
            assert!(svg.contains(text), "{text}: {svg}");
        }
    }
}

#[test]
fn panels_share_a_scale_unless_asked() {
    let folder = Folder::new();
    let input = folder.write("known.safetensors", &known(), &[("scale", "1")]);
    let (pixels, svg) = draw(&folder, &input, &["--reduce", "none"]);
    assert_eq!(svg.matches("linear scale").count(), 1);
    let (each, svg) = draw(&folder, &input, &["--reduce", "none", "--scale-each"]);
    assert_eq!((svg.matches("linear scale").count(), svg.matches(">head 1<").count()), (2, 1));
    // the weights of head 1 are flatter
    assert!(count(&pixels, BRIGHTEST) < 2 * 28 * 28 && count(&each, BRIGHTEST) >= 2 * 28 * 28);
}

#[test]
fn a_large_map_is_scaled_down_by_the_largest() {
    let folder = Folder::new();
    // one key of 4000 has nearly all the weight
    let tensors = [
        f32s("query", &[1, 1, 1, 1], |_| 20.0),
        f32s("key", &[1, 1, 4000, 1], |at| if at == 2222 { 1.0 } else { 0.0 }),
        f32s("value", &[1, 1, 4000, 1], |_| 1.0),
    ];
    let input = folder.write("large.safetensors", &tensors, &[("scale", "1")]);
    let (pixels, svg) = draw(&folder, &input, &[]);
    assert!(svg.contains("a cell of the picture is the largest of 1 row x 3 columns"), "{svg}");
    // beside the end of the legend's bar
    assert!(count(&pixels, BRIGHTEST) >= 28 + 10, "{}", count(&pixels, BRIGHTEST));
}

#[test]
fn the_file_of_the_readme_follows_the_sound() {
    let folder = Folder::new();
    let output = folder.at("map.png");
    let said = good(&["map", WHISPER, "--output", &output, "--device", "cpu"]);
    assert!(said.contains("the mean of 5 heads, 39 rows by 535 keys"), "{said}");
    let ([width, height], pixels) = pixels(&output);
    // the plot starts behind a frame of one pixel: 535 keys of two pixels and 39 rows of sixteen
    let frame = |at: &usize| (0..300).all(|n| pixels[at + n * width] == [96; 3]);
    let corner = (0..width * height / 2).find(frame).unwrap();
    let brightness = |at: usize| pixels[at].iter().map(|&color| u32::from(color)).sum::<u32>();
    let brightest = |row: usize| {
        let start = corner + 1 + (16 * row + 9) * width;
        (0..1070).max_by_key(|&x| brightness(start + x)).unwrap()
    };
    assert!(brightest(3) < brightest(12) && brightest(12) < brightest(34));
}

#[test]
fn letters_are_drawn_or_told() {
    let folder = Folder::new();
    let labels = r#"["粒子 Ωж", "سلام <b>", "\ud83d\ude42", "नमस्ते"]"#;
    let input = folder.write("known.safetensors", &known(), &[("row_labels", labels)]);
    let [png, svg] = ["map.png", "map.svg"].map(|name| folder.at(name));
    let said = |output: &str| {
        let output = program(&["map", &input, "-o", output, "--device", "cpu"]);
        assert!(output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let warned = said(&png);
    assert!(warned.contains("U+1F642 is not in the font of a PNG") && warned.contains("joins"), "{warned}");
    assert_eq!(said(&svg), "");
    let text = fs::read_to_string(svg).unwrap();
    assert!(["粒子 Ωж", "سلام &lt;b&gt;", "🙂"].iter().all(|label| text.contains(label)), "{text}");
}

#[test]
fn colors_of_a_table_and_pictures_of_others_are_refused() {
    let folder = Folder::new();
    let input = folder.write("known.safetensors", &known(), &[]);
    let output = folder.at("map.csv");
    for flags in [&["--color-scale", "log"][..], &["--scale-each"]] {
        let said = bad(&[&["map", &input, "-o", &output, "--device", "cpu"], flags].concat());
        assert!(said.contains(flags[0]) && said.contains("a table"), "{said}");
    }
    let others = folder.at("drawing.svg");
    fs::write(&others, "<svg xmlns=\"http://www.w3.org/2000/svg\"></svg>").unwrap();
    assert!(bad(&["map", &input, "-o", &others, "--device", "cpu"]).contains("not overwritten"));
    // a picture of this program is replaced
    for _ in 0..2 {
        good(&["map", &input, "-o", &folder.at("ours.svg"), "--device", "cpu"]);
    }
}

#[test]
fn a_picture_in_characters_names_what_is_in_it() {
    let folder = Folder::new();
    let input =
        folder.write("known.safetensors", &known(), &[("scale", "1"), ("show_keys", "3"), ("seconds_per_key", "0.5")]);
    let said = good(&["run", &input, "-o", &folder.at("out"), "--device", "cpu", "--show"]);
    for text in [
        "attention weights: mean of heads 0-1 of 2",
        "query ┌───┐ most at",
        "│???│ NaN",
        "│   │ no key",
        "0.00 s to 1.50 s (time, 0.5 s a key)",
        "? is no number (NaN); a row with no key sees none",
        "not shown: key 3",
    ] {
        assert!(said.contains(text), "{text}: {said}");
    }
}
