// matrices_16.wgsl: the matrices of a cooperative product, 16 by 16.

const SIZE: u32 = 16u;

alias LeftMatrix = coop_mat16x16<f16, A>;
alias RightMatrix = coop_mat16x16<f16, B>;
alias SumMatrix = coop_mat16x16<f32, C>;
