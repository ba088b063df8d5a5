//! Batches that arrive damaged: what is said of them, and when it is enough.

use std::sync::Mutex;

use tracing::warn;

use crate::error::MigrationError;
use crate::flow::lock;

/// In so many epochs may batches arrive damaged. A source gives up before that, if it means well: after four attempts, each of which may
/// spoil one further epoch that was on its way.
const MAX_EPOCHS: u32 = 8;

/// Counts what arrived damaged.
#[derive(Debug, Default)]
pub(crate) struct Damage(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    /// Of the epoch under way: batches, their pages, and what was seen first.
    batches: u64,
    pages: u64,
    first: Option<String>,
    /// Epochs in which there was damage.
    epochs: u32,
}

impl Damage {
    /// A batch of the epoch under way was damaged.
    pub(crate) fn note(&self, pages: usize, reason: &str) {
        let mut state = lock(&self.0);
        state.batches += 1;
        state.pages += pages as u64;
        state.first.get_or_insert_with(|| reason.to_owned());
    }

    /// The epoch under way is over: nothing more of it comes. Says what was damaged, once however much it was.
    ///
    /// # Errors
    ///
    /// [`MigrationError::Damaged`] if that happens too often.
    pub(crate) fn end_epoch(&self, epoch: u32) -> Result<(), MigrationError> {
        let mut state = lock(&self.0);
        let Some(reason) = state.first.take() else { return Ok(()) };
        let (batches, pages) = (state.batches, state.pages);
        *state = State { epochs: state.epochs + 1, ..State::default() };
        warn!(epoch, batches, pages, reason, "batches are damaged, they have to be sent again");
        if state.epochs > MAX_EPOCHS {
            return Err(MigrationError::Damaged(format!("{reason}, again and again")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn damage_may_be_in_a_few_epochs_however_much_it_is() {
        let damage = Damage::default();
        for epoch in 0..MAX_EPOCHS {
            (0..1000).for_each(|page| damage.note(16, &format!("page {page}")));
            damage.end_epoch(2 * epoch).unwrap();
            damage.end_epoch(2 * epoch + 1).expect("nothing was damaged in this one");
        }
        damage.note(1, "once more");
        damage.note(1, "and again");
        let error = damage.end_epoch(99).unwrap_err();
        assert!(
            matches!(&error, MigrationError::Damaged(why) if why == "once more, again and again"),
            "{error}"
        );
    }
}
