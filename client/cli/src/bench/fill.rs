//! Fills the file that is to be measured.

use super::pattern;
use holdfast_client::{Access, Open, Region, Transport};
use indicatif::ProgressBar;

/// Requests in flight.
const DEPTH: u64 = 8;
/// Bytes of one write, about.
const RUN_BYTES: usize = 1 << 20;

/// Writes every block, of generation 0, and flushes.
///
/// # Errors
/// What a request ended with.
pub(super) async fn fill(
    open: &Open,
    transport: Transport,
    block: usize,
    all: u64,
    bar: &ProgressBar,
) -> anyhow::Result<()> {
    let channel = open.connect(transport).await?;
    let binding = open.bind_with_access(&channel, Access::WRITE).await?;
    let run = (RUN_BYTES / block).max(1) as u64;
    let mut lanes = tokio::task::JoinSet::new();
    for lane in 0..DEPTH {
        let (binding, bar) = (binding.clone(), bar.clone());
        lanes.spawn(async move {
            let longest = usize::try_from(run)? * block;
            let (region, mut bytes) = (Region::allocate(longest)?, vec![0; longest]);
            let mut first = lane * run;
            while first < all {
                let count = run.min(all - first);
                for (number, bytes) in (first..first + count).zip(bytes.chunks_exact_mut(block)) {
                    pattern::fill(bytes, number, 0);
                }
                let length = usize::try_from(count)? * block;
                region.copy_in(0, &bytes[..length])?;
                binding.write_all(&region, 0..length, first * block as u64).await?;
                bar.inc(count);
                first += DEPTH * run;
            }
            anyhow::Ok(())
        });
    }
    while let Some(ended) = lanes.join_next().await {
        ended??;
    }
    binding.flush().await?;
    binding.unbind().await?;
    bar.finish_and_clear();
    Ok(())
}
