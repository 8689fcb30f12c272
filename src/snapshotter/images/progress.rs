//! How long a layer is pulled into a disk because a rule or a label says so: as long as it brings bytes and somebody waits for its image.

use std::{pin::pin, time::Duration};

use tokio::time::{Instant, timeout};

use super::interest::Interest;
use crate::{
    error::{Error, Kind, Result},
    layer::LayerBlob,
    snapshotter::options::PullLimits,
};

/// Interval in which such a layer is looked at.
const LOOK_TIME: Duration = Duration::from_secs(1);

/// Waits for a layer that is pulled. `arrived`: how many bytes of its blob are here, in their order.
pub(super) async fn while_it_arrives<T>(
    pulling: impl Future<Output = Result<T>>,
    arrived: impl Fn() -> u64,
    layer: &LayerBlob,
    limits: &PullLimits,
    interest: &Interest,
) -> Result<T> {
    let mut pulling = pin!(pulling);
    let given_up = |why: String| Err(Error::new(Kind::Unavailable, why));
    let look = LOOK_TIME.min(limits.progress_time);
    let (mut seen, mut since) = (0, Instant::now());
    loop {
        if let Ok(pulled) = timeout(look, &mut pulling).await {
            return pulled;
        }
        if interest.is_over() {
            return given_up("nobody waits for the image any more".to_owned());
        }
        let now = arrived();
        // its turn has not come, or all of it is here
        if now == 0 || now >= layer.size {
            since = Instant::now();
        } else if since.elapsed() >= limits.progress_time {
            if now - seen < limits.progress {
                return given_up(format!(
                    "only {} bytes of layer {} have arrived within {} s",
                    now - seen,
                    layer.digest,
                    limits.progress_time.as_secs_f64()
                ));
            }
            (seen, since) = (now, Instant::now());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::{Digest, Packing};

    const SIZE: u64 = 100 << 20;

    /// Pulls a layer of which so many bytes have arrived after each second, and which needs so many seconds.
    async fn pull(
        seconds: u64,
        arrived: impl Fn(u64) -> u64,
        interest: &Interest,
    ) -> (Result<()>, u64) {
        let begun = Instant::now();
        let digest = Digest::of(b"layer");
        let layer = LayerBlob {
            digest,
            size: SIZE,
            packing: Packing::Gzip,
            diff_id: digest,
        };
        let pulling = async {
            tokio::time::sleep(Duration::from_secs(seconds)).await;
            Ok(())
        };
        let arrived = || arrived(begun.elapsed().as_secs());
        let limits = PullLimits::default();
        let pulled = while_it_arrives(pulling, arrived, &layer, &limits, interest).await;
        (pulled, begun.elapsed().as_secs())
    }

    #[tokio::test(start_paused = true)]
    async fn a_layer_that_drips_is_given_up_and_a_slow_one_is_not() {
        let interest = Interest::new();
        let _waiting = interest.enter();
        let PullLimits {
            progress,
            progress_time,
            ..
        } = PullLimits::default();
        let period = progress_time.as_secs();
        // a little more than the limit, and a little less
        let per_second = progress / period;
        let (pulled, _) = pull(10 * period, |second| second * (per_second + 1), &interest).await;
        pulled.unwrap();
        let (pulled, after) =
            pull(10 * period, |second| second * (per_second - 100), &interest).await;
        let error = pulled.unwrap_err().report();
        assert!(error.contains("bytes of layer sha256:"), "{error}");
        assert!((period..period + 3).contains(&after), "{after}");
        // one that was fast, and drips then
        let (pulled, after) = pull(
            10 * period,
            |second| (SIZE / 2).min(second * SIZE / 20) + second,
            &interest,
        )
        .await;
        assert!(pulled.is_err());
        assert!((2 * period..2 * period + 3).contains(&after), "{after}");
        // one whose turn has not come, and one that is unpacked
        for arrived in [0, SIZE] {
            let (pulled, _) = pull(10 * period, |_| arrived, &interest).await;
            pulled.unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_layer_for_which_nobody_waits_is_given_up() {
        let interest = Interest::new();
        interest.end();
        let (pulled, _) = pull(100, |_| SIZE, &interest).await;
        let error = pulled.unwrap_err().report();
        assert!(error.contains("nobody waits"), "{error}");
    }
}
