// lse_none.wgsl: no log-sum-exp asked for.

fn store_lse(row: Row, end: RowEnd) {
}
