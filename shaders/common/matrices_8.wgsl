// matrices_8.wgsl: the matrices of a cooperative product, 8 by 8.

const SIZE: u32 = 8u;

alias LeftMatrix = coop_mat8x8<f16, A>;
alias RightMatrix = coop_mat8x8<f16, B>;
alias SumMatrix = coop_mat8x8<f32, C>;
