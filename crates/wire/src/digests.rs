//! The digests before the hand-over: every page of every region once, in order.

use crate::error::{WireError, malformed};
use crate::session::Session;

/// Which digest is due. Both ends keep one, so that "verified" cannot be claimed with pages left out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct DigestCursor {
    region_index: usize,
    next_page: u64,
    ended: bool,
}

impl DigestCursor {
    /// Takes `count` digests from `first_page` of `region`.
    pub(crate) fn take(
        &mut self,
        session: &Session,
        region: u32,
        first_page: u64,
        count: u64,
    ) -> Result<(), WireError> {
        let due = session.regions.get(self.region_index).filter(|_| !self.ended);
        let Some(due) = due else {
            return Err(malformed("Digests", "digests after the last page", "DigestsEnd"));
        };
        if (region, first_page) != (due.id, self.next_page) {
            return Err(malformed(
                "place of Digests",
                format_args!("region {region}, page {first_page}"),
                format_args!("region {}, page {}", due.id, self.next_page),
            ));
        }
        let left = due.pages - self.next_page;
        if count > left {
            return Err(malformed(
                "the number of digests",
                count,
                format_args!("at most {left}, the rest of the region"),
            ));
        }
        self.next_page += count;
        if self.next_page == due.pages {
            self.region_index += 1;
            self.next_page = 0;
        }
        Ok(())
    }

    /// Takes the end.
    pub(crate) fn end(&mut self, session: &Session) -> Result<(), WireError> {
        if self.ended || self.region_index < session.regions.len() {
            let seen = if self.ended { "a second one" } else { "pages without a digest" };
            return Err(malformed("DigestsEnd", seen, "one, after the digest of the last page"));
        }
        self.ended = true;
        Ok(())
    }

    /// `Ready` comes only after all digests.
    pub(crate) fn allow_ready(&self) -> Result<(), WireError> {
        if self.ended {
            return Ok(());
        }
        Err(malformed("Ready", "before the digest of the last page", "after DigestsEnd"))
    }

    /// Whether the end has passed.
    pub(crate) fn ended(&self) -> bool {
        self.ended
    }
}
