// chosen_buffer.wgsl: the gradient of chosen weights, behind the row data, found by head, row and key; needs row_data_buffer.
//
// At params.chosen_at stand where the lists of heads, rows and keys begin, where the gradient does, its heads, rows and columns, and
// the factor on each of its numbers. A list has for each head, row or key where its places begin, one more, and the places.

const CHOSEN: bool = true;

// Where the places of the n-th begin and end.
fn chosen_places(list: u32, n: u32) -> vec2u {
    let at = row_data_word(params.chosen_at + list) + n;
    return vec2u(row_data_word(at), row_data_word(at + 1u));
}

fn chosen_heads(row: Row) -> vec2u {
    return chosen_places(0u, params.head_base + row.h);
}

fn chosen_rows(row: Row) -> vec2u {
    return chosen_places(1u, params.row_base + row.i);
}

fn chosen_columns(j: u32) -> vec2u {
    // kernels ask for keys behind the last too
    return chosen_places(2u, min(params.key_base + j, params.kv_len_whole - 1u));
}

fn is_chosen(row: Row, j: u32) -> bool {
    let heads = chosen_heads(row);
    let rows = chosen_rows(row);
    let columns = chosen_columns(j);
    return heads.x < heads.y && rows.x < rows.y && columns.x < columns.y;
}

fn d_chosen(row: Row, j: u32) -> f32 {
    let heads = chosen_heads(row);
    let rows = chosen_rows(row);
    let columns = chosen_columns(j);
    let start = row_data_word(params.chosen_at + 3u);
    let shown = row_data_word(params.chosen_at + 4u);
    let row_count = row_data_word(params.chosen_at + 5u);
    let column_count = row_data_word(params.chosen_at + 6u);
    var sum = 0.0;
    for (var head = heads.x; head < heads.y; head++) {
        let plane = (params.batch_base + row.b) * shown + row_data_word(head);
        for (var r = rows.x; r < rows.y; r++) {
            let line = start + (plane * row_count + row_data_word(r)) * column_count;
            for (var column = columns.x; column < columns.y; column++) {
                sum += bitcast<f32>(row_data_word(line + row_data_word(column)));
            }
        }
    }
    return sum * bitcast<f32>(row_data_word(params.chosen_at + 7u));
}
