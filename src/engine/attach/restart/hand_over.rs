//! Prepares a planned restart: what has begun is completed, and the next daemon takes the rest over as from one that died.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use crate::{
    engine::attach::engine::{Engine, EnginePhase},
    error::{Error, Kind, Result},
};

/// Maximum time until attaches and detaches that have begun are complete.
const COMPLETION_TIME: Duration = Duration::from_secs(20);
/// Interval for polling whether they are.
const POLL_INTERVAL: Duration = Duration::from_millis(5);

impl Engine {
    /// Refuses new attachments, waits until none is being made or released, and changes none from then on. The process is to end after that
    /// without dropping the engine, as one that is killed. `Busy` if something takes too long, or the engine ends or is handed over already; it serves on then.
    pub async fn hand_over(&self) -> Result<()> {
        {
            let _table = self.table();
            if !self.exchange_phase(&[EnginePhase::Serving], EnginePhase::HandingOver) {
                let why = "the daemon ends already, or is being replaced";
                return Err(Error::new(Kind::Busy, why));
            }
        }
        let deadline = Instant::now() + COMPLETION_TIME;
        while let Some(what) = self.unfinished() {
            if self.is_ending() {
                return Err(Error::new(Kind::Busy, "the daemon ends"));
            }
            if Instant::now() > deadline {
                self.serve_on();
                return Err(Error::new(
                    Kind::Busy,
                    format!(
                        "{what} has not completed within {} s; try again later",
                        COMPLETION_TIME.as_secs()
                    ),
                ));
            }
            sleep(POLL_INTERVAL).await;
        }
        Ok(())
    }

    /// A change of an attachment that has begun and is not complete. `None`: from now on none begins.
    fn unfinished(&self) -> Option<String> {
        let table = self.table();
        if let Some(id) = table.changing.iter().next() {
            return Some(format!("the attach or detach of attachment {id}"));
        }
        // its client has not mounted it yet
        let offered = table.live.values().find(|live| {
            let phase = *live.phase.borrow();
            !phase.is_mounted && !phase.has_ended
        });
        if let Some(offered) = offered {
            return Some(format!("the mount of {}", offered.attachment.reference));
        }
        self.exchange_phase(&[EnginePhase::HandingOver], EnginePhase::HandedOver);
        None
    }

    /// Takes a hand-over back: attachments are accepted again.
    pub fn serve_on(&self) {
        let _table = self.table();
        let handing_over = [EnginePhase::HandingOver, EnginePhase::HandedOver];
        self.exchange_phase(&handing_over, EnginePhase::Serving);
    }

    /// Changes the phase if it is one of `from`, and returns whether it was. Called while the table is locked.
    fn exchange_phase(&self, from: &[EnginePhase], to: EnginePhase) -> bool {
        self.phase.send_if_modified(|phase| {
            let is_one = from.contains(phase);
            if is_one {
                *phase = to;
            }
            is_one
        })
    }
}
