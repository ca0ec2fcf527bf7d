//! The shapes that have a name, and where their numbers are from.

use super::Workload;
use crate::problem::AttentionSpec;
use crate::tensor::{Layout, TensorSpec};

/// Every workload.
#[must_use]
pub fn all() -> Vec<Workload> {
    // batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim
    #[rustfmt::skip]
    let shapes: [(&str, [usize; 7], &str); 31] = [
        ("sd15_64", [1, 8, 8, 4096, 77, 40, 40],
            "Stable Diffusion 1.5 at 512x512, latents of 64x64 to 77 prompt tokens (candle stable_diffusion/mod.rs)"),
        ("sdxl_32", [1, 20, 20, 1024, 77, 64, 64],
            "Stable Diffusion XL at 1024x1024, latents of 32x32 to 77 prompt tokens (candle stable_diffusion/mod.rs)"),
        ("whisper_decode", [1, 8, 8, 1, 1500, 64, 64],
            "Whisper base, one token to 30 s of audio (candle whisper/mod.rs)"),
        ("whisper_prefill", [1, 8, 8, 224, 1500, 64, 64],
            "Whisper base, a prompt of 224 tokens to 30 s of audio (candle whisper/mod.rs)"),
        ("square_1k", [1, 8, 8, 1024, 1024, 64, 64],
            "as many queries as keys, the shape that attention benchmarks use"),
        ("long_kv", [1, 8, 8, 16, 32768, 128, 128],
            "few queries to a very long context"),
        ("perceiver", [1, 8, 8, 256, 8192, 64, 64],
            "Perceiver, 256 latents to 8192 inputs (arXiv:2103.03206)"),
        ("gqa", [1, 32, 8, 128, 2048, 128, 128],
            "grouped heads, four query heads to a key/value head, as in Llama 3"),
        ("sd15_32", [2, 8, 8, 1024, 77, 80, 80],
            "Stable Diffusion 1.5 at 512x512, latents of 32x32, with guidance (candle stable_diffusion/mod.rs)"),
        ("sd15_16", [2, 8, 8, 256, 77, 160, 160],
            "Stable Diffusion 1.5 at 512x512, latents of 16x16, with guidance (candle stable_diffusion/mod.rs)"),
        ("sd15_8", [2, 8, 8, 64, 77, 160, 160],
            "Stable Diffusion 1.5 at 512x512, latents of 8x8, with guidance (candle stable_diffusion/mod.rs)"),
        ("sd21_96", [2, 5, 5, 9216, 77, 64, 64],
            "Stable Diffusion 2.1 at 768x768, latents of 96x96, with guidance (candle stable_diffusion/mod.rs)"),
        ("sd21_48", [2, 10, 10, 2304, 77, 64, 64],
            "Stable Diffusion 2.1 at 768x768, latents of 48x48, with guidance (candle stable_diffusion/mod.rs)"),
        ("sd21_24", [2, 20, 20, 576, 77, 64, 64],
            "Stable Diffusion 2.1 at 768x768, latents of 24x24, with guidance (candle stable_diffusion/mod.rs)"),
        ("sdxl_64", [2, 10, 10, 4096, 77, 64, 64],
            "Stable Diffusion XL at 1024x1024, latents of 64x64, with guidance (candle stable_diffusion/mod.rs)"),
        ("ip_adapter_4", [2, 8, 8, 4096, 4, 40, 40],
            "IP-Adapter on Stable Diffusion 1.5, 4 image tokens (diffusers attention_processor.py)"),
        ("wan_1b3", [1, 12, 12, 32760, 512, 128, 128],
            "Wan 2.1 T2V 1.3B, 81 frames of 480x832 to 512 prompt tokens (mlx-examples wan_t2v_1_3B.py)"),
        ("whisper_beam5", [5, 8, 8, 1, 1500, 64, 64],
            "Whisper base, one token of five beams that share 30 s of audio (candle whisper/mod.rs)"),
        ("whisper_align_448", [1, 8, 8, 448, 1500, 64, 64],
            "Whisper base, word timestamps of 448 tokens (huggingface/transformers#23205)"),
        ("bart_decode", [1, 16, 16, 1, 1024, 64, 64],
            "BART large, one token to 1024 (candle marian.rs)"),
        ("marian_decode", [1, 8, 8, 1, 512, 64, 64],
            "Marian base, one token to 512 (candle marian.rs)"),
        ("t5_decode", [8, 8, 8, 1, 512, 64, 64],
            "T5 small, one token of eight sequences to 512, scale 1 (candle t5.rs)"),
        ("flamingo_resampler", [1, 8, 8, 64, 320, 64, 64],
            "Flamingo, 64 latents to one image and themselves (open_flamingo helpers.py)"),
        ("mllama_prefill", [1, 32, 8, 512, 6404, 128, 128],
            "Llama 3.2 Vision, 512 text tokens to four image tiles (Hugging Face mllama configuration)"),
        ("qformer", [1, 12, 12, 32, 257, 64, 64],
            "BLIP-2 Q-Former, 32 queries to 257 image patches (Hugging Face blip-2 configuration)"),
        ("perceiver_io", [1, 8, 8, 256, 2048, 32, 160],
            "Perceiver IO on text, keys of width 32, values of 160 (Hugging Face perceiver configuration)"),
        ("sam_token_to_image", [1, 8, 8, 7, 4096, 16, 16],
            "Segment Anything, 7 prompt tokens to 64x64 patches (segment_anything/modeling/transformer.py)"),
        ("sam_image_to_token", [1, 8, 8, 4096, 7, 16, 16],
            "Segment Anything, 64x64 patches to 7 prompt tokens (segment_anything/modeling/transformer.py)"),
        ("detr", [1, 8, 8, 100, 850, 32, 32],
            "DETR decoder, 100 object queries to 25x34 image features (facebookresearch/detr)"),
        ("retro", [32, 8, 8, 64, 256, 64, 64],
            "RETRO, 32 chunks of 64 tokens, each to two neighbours of 128 (lucidrains/RETRO-pytorch)"),
        ("fid_decode", [1, 12, 12, 1, 25_000, 64, 64],
            "Fusion-in-Decoder base, an answer token to 100 passages of 250 (facebookresearch/FiD src/model.py)"),
    ];
    shapes
        .into_iter()
        .map(|(name, [batch, q_heads, kv_heads, q_len, kv_len, head_dim, v_head_dim], about)| {
            let kv_batch = if name == "whisper_beam5" { 1 } else { batch };
            let mut spec = AttentionSpec::from_tensors(
                TensorSpec::f32(Layout::bhld([batch, q_heads, q_len, head_dim])),
                TensorSpec::f32(Layout::bhld([kv_batch, kv_heads, kv_len, head_dim])),
                TensorSpec::f32(Layout::bhld([kv_batch, kv_heads, kv_len, v_head_dim])),
            );
            if name == "t5_decode" {
                spec.scale = Some(1.0);
            }
            Workload { name, about, spec }
        })
        .collect()
}
