//! The lists of chosen weights that the kernels read (`shaders/common/chosen_buffer.wgsl`).

use crate::backward::BackwardProblem;
use crate::weights::{HeadReduce, KeyList};

/// Words before the lists of chosen weights.
const CHOSEN_HEADER: usize = 8;

/// Words that [`chosen_words`] gives.
pub(super) fn chosen_len(problem: &BackwardProblem) -> usize {
    let Some(weights) = problem.weights() else { return 0 };
    let forward = problem.forward();
    let places = match weights.keys() {
        KeyList::Each(keys) => keys.len(),
        KeyList::Segments(segments) => {
            segments.iter().fold(0usize, |sum, [start, end]| sum.saturating_add((end - start) as usize))
        }
    };
    // each list has the end of its last places too
    let starts = forward.q_heads() + forward.q_len() + forward.kv_len() + 3;
    (CHOSEN_HEADER + starts + weights.heads().len() + weights.rows().len()).saturating_add(places)
}

/// What stands before the gradient of chosen weights (`shaders/common/chosen_buffer.wgsl`), if it begins at word `at`: for each head,
/// row and key its places in the gradient.
pub(crate) fn chosen_words(problem: &BackwardProblem, at: usize) -> Vec<u32> {
    let Some(weights) = problem.weights() else { return vec![] };
    let forward = problem.forward();
    let narrow = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    let mut heads = vec![vec![]; forward.q_heads()];
    for (place, head) in weights.heads().iter().enumerate() {
        // where heads are reduced, all of them are one, and a head that is listed twice counts twice
        let place = if weights.reduce() == HeadReduce::Each { place } else { 0 };
        heads[*head as usize].push(place);
    }
    let mut rows = vec![vec![]; forward.q_len()];
    weights.rows().iter().enumerate().for_each(|(place, row)| rows[*row as usize].push(place));
    let mut keys = vec![vec![]; forward.kv_len()];
    match weights.keys() {
        KeyList::Each(each) => each.iter().enumerate().for_each(|(place, key)| keys[*key as usize].push(place)),
        KeyList::Segments(segments) => {
            for (place, [start, end]) in segments.iter().enumerate() {
                (*start..*end).for_each(|key| keys[key as usize].push(place));
            }
        }
    }
    let factor = match weights.reduce() {
        HeadReduce::Each | HeadReduce::Sum => 1.0,
        HeadReduce::Mean => 1.0 / weights.heads().len().max(1) as f32,
    };
    let [_, shown, row_count, columns] = weights.shape();
    let lists = [heads, rows, keys];
    let words_of = |list: &Vec<Vec<usize>>| list.len() + 1 + list.iter().map(Vec::len).sum::<usize>();
    let [heads_words, rows_words, keys_words] = [&lists[0], &lists[1], &lists[2]].map(words_of);
    let first = at + CHOSEN_HEADER;
    let starts = [first, first + heads_words, first + heads_words + rows_words];
    let mut words = starts.map(narrow).to_vec();
    words.extend([starts[2] + keys_words, shown, row_count, columns].map(narrow));
    words.push(f32::to_bits(factor));
    for (list, start) in lists.iter().zip(starts) {
        let mut place = start + list.len() + 1;
        for places in list {
            words.push(narrow(place));
            place += places.len();
        }
        words.push(narrow(place));
        words.extend(list.iter().flatten().map(|place| narrow(*place)));
    }
    words
}
