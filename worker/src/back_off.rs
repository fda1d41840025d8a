//! Pauses between tries.

use std::time::Duration;

/// The pause after the try `attempt`, counted from 1: `first`, doubled with each try up to `most`, with jitter so that
/// what failed together parts.
pub fn back_off(first: Duration, attempt: i32, most: Duration) -> Duration {
    let doublings = u32::try_from(attempt - 1).unwrap_or(0).min(16);
    first.saturating_mul(1 << doublings).min(most).mul_f64(rand::random_range(0.8..1.2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_pause_doubles_up_to_its_most() {
        let (second, hour) = (Duration::from_secs(1), Duration::from_secs(3_600));
        for (attempt, least, most) in [(1, 0.8, 1.2), (2, 1.6, 2.4), (5, 12.8, 19.2), (40, 2_880.0, 4_320.0)] {
            let pause = back_off(second, attempt, hour).as_secs_f64();
            assert!((least..=most).contains(&pause), "try {attempt}: {pause} s");
        }
    }
}
