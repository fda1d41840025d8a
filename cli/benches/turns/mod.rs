//! Two things measured side by side, in turn, so that what else the machine does meanwhile meets both alike.

/// The rates of one round: the one, the other twice, and the one again, so that what grows or fades within a round favours
/// neither; every second round begins with the other. `rate` measures the one (0) or the other (1).
pub async fn round(number: usize, mut rate: impl AsyncFnMut(usize) -> f64) -> [f64; 2] {
    let mut rates = [0.0; 2];
    for turn in [0, 1, 1, 0] {
        let which = (turn + number) % 2;
        rates[which] += rate(which).await / 2.0;
    }
    rates
}

/// The value that `at` quarters of them are below; with 4, the greatest.
pub fn quartile(values: &mut [f64], at: usize) -> f64 {
    values.sort_by(f64::total_cmp);
    values[(values.len() * at / 4).min(values.len() - 1)]
}
