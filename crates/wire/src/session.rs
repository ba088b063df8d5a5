//! What both ends agreed on.

use crate::error::{WireError, at_most, malformed};
use crate::message::{Accept, Hello, Offer, Region, Role};
use crate::{MAX_VERSION, MIN_VERSION};

/// The newest version that the peer's range and this build have in common.
///
/// # Errors
/// [`WireError::UnsupportedVersion`] if there is none.
pub fn choose_version(hello: &Hello) -> Result<u16, WireError> {
    let version = hello.max_version.min(MAX_VERSION);
    if version < hello.min_version || version < MIN_VERSION {
        return Err(WireError::UnsupportedVersion {
            what: "protocol version",
            seen: format!("{} to {}", hello.min_version, hello.max_version),
            expected: format!("{MIN_VERSION} to {MAX_VERSION}"),
        });
    }
    Ok(version)
}

/// What an offer and its acceptance come to. Batches are checked against it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Session {
    /// Guest memory, with ascending ids.
    pub regions: Vec<Region>,
    /// Allowed encodings: bit i stands for tag i.
    pub encodings: u16,
    /// Size of the history; 0 if batches carry no slots.
    pub history_slots: u32,
    /// Pages of the largest batch.
    pub max_batch_pages: u32,
    /// Data connections.
    pub connections: u16,
    /// Whether digests are compared before the hand-over.
    pub verify: bool,
}

impl Session {
    /// Joins an offer and its acceptance.
    ///
    /// # Errors
    /// If the destination took more than was offered.
    pub fn new(offer: &Offer, accept: &Accept) -> Result<Session, WireError> {
        if accept.encodings & !offer.encodings != 0 {
            return Err(malformed(
                "the encodings accepted",
                format_args!("{:#06x}", accept.encodings),
                format_args!("a subset of {:#06x}", offer.encodings),
            ));
        }
        at_most("the history accepted", accept.history_slots.into(), offer.history_slots.into())?;
        at_most("the batch size accepted", accept.max_batch_pages.into(), offer.max_batch_pages.into())?;
        Ok(Session {
            regions: offer.regions.clone(),
            encodings: accept.encodings,
            history_slots: accept.history_slots,
            max_batch_pages: accept.max_batch_pages,
            connections: offer.connections,
            verify: offer.verify,
        })
    }

    /// Checks that pages may have been in one batch.
    pub(crate) fn check_pages(&self, region: u32, pages: &[u64]) -> Result<(), WireError> {
        let size = self.region(region).map(|region| region.pages);
        let size =
            size.ok_or_else(|| malformed("region of a damaged batch", region, "a region of the offer"))?;
        at_most("a damaged batch in pages", pages.len() as u64, self.max_batch_pages.into())?;
        match pages.last() {
            Some(&last) if last >= size => at_most("a page of a damaged batch", last, size.saturating_sub(1)),
            _ => Ok(()),
        }
    }

    /// The region with this id.
    pub fn region(&self, id: u32) -> Option<&Region> {
        self.regions.binary_search_by_key(&id, |region| region.id).ok().map(|i| &self.regions[i])
    }
}

/// Which data connections have arrived at the destination.
#[derive(Clone, Debug)]
pub struct ConnectionSet {
    session: [u8; 16],
    arrived: Vec<bool>,
}

impl ConnectionSet {
    /// Waits for `connections` data connections of this session.
    pub fn new(session: [u8; 16], connections: u16) -> ConnectionSet {
        ConnectionSet { session, arrived: vec![false; connections.into()] }
    }

    /// Takes the hello of a further connection and returns its index.
    ///
    /// # Errors
    /// If it belongs to another session, is not a data connection, or has an index that is out of range or taken.
    pub fn admit(&mut self, hello: &Hello) -> Result<u16, WireError> {
        if hello.session != self.session {
            return Err(malformed(
                "session of a connection",
                "another session",
                "the session of the control connection",
            ));
        }
        let Role::Data { index } = hello.role else {
            return Err(malformed(
                "role of a connection",
                "a second control connection",
                "a data connection",
            ));
        };
        match self.arrived.get_mut(usize::from(index)) {
            Some(taken @ false) => {
                *taken = true;
                Ok(index)
            }
            Some(true) => {
                Err(malformed("index of a data connection", index, "one that has not connected yet"))
            }
            None => at_most("index of a data connection", index.into(), self.arrived.len() as u64 - 1)
                .map(|()| index),
        }
    }

    /// Whether all have arrived.
    pub fn complete(&self) -> bool {
        self.arrived.iter().all(|&arrived| arrived)
    }
}
