//! Messages to bytes and back. Both directions check the same rules, so that a defect shows up at the end that has it.

use crate::cursor::Cursor;
use crate::error::{WireError, at_most, malformed};
use crate::kind::Kind;
use crate::limits::{
    Limits, MAX_BATCH_PAGES, MAX_CONNECTIONS, MAX_DIGESTS, MAX_MACHINE_LEN, MAX_NAME_LEN, MAX_REGIONS,
    MAX_REPORT_LEN, MAX_STATE_CHUNK, MAX_STATE_LEN, MAX_TEXT_LEN,
};
use crate::message::{Accept, Ack, ErrorCode, Hello, Message, Offer, Region, Role};
use crate::text::misleads;

/// The bit of the encoding that fits every page.
const RAW_BIT: u16 = 1 << 2;

impl Message {
    /// Appends the body of the frame.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
        self.check(&Limits { max_guest_pages: u64::MAX, ..Limits::default() })?;
        let mut put = |bytes: &[u8]| out.extend_from_slice(bytes);
        match self {
            Message::Hello(hello) => {
                let (role, index) = match hello.role {
                    Role::Control => (0u8, 0),
                    Role::Data { index } => (1, index),
                };
                put(&hello.min_version.to_le_bytes());
                put(&hello.max_version.to_le_bytes());
                put(&[role, 0]);
                put(&index.to_le_bytes());
                put(&hello.session);
            }
            Message::HelloAck { version } => put(&version.to_le_bytes()),
            Message::Offer(offer) => encode_offer(offer, out),
            Message::Accept(accept) => {
                put(&accept.encodings.to_le_bytes());
                put(&[0; 2]);
                put(&accept.history_slots.to_le_bytes());
                put(&accept.max_batch_pages.to_le_bytes());
            }
            Message::EpochStart { epoch, pages } => {
                put(&epoch.to_le_bytes());
                put(&pages.to_le_bytes());
            }
            Message::Barrier { epoch, batches, pages } => {
                put(&epoch.to_le_bytes());
                put(&batches.to_le_bytes());
                put(&pages.to_le_bytes());
            }
            Message::EpochDone { epoch } => put(&epoch.to_le_bytes()),
            Message::Ack(ack) => {
                put(&ack.batches.to_le_bytes());
                put(&ack.wire_bytes.to_le_bytes());
                put(&ack.pages.to_le_bytes());
            }
            Message::DeviceState { total_len, offset, bytes } => {
                put(&total_len.to_le_bytes());
                put(&offset.to_le_bytes());
                put(bytes);
            }
            Message::StateEnd { len, xxh3 } => {
                put(&len.to_le_bytes());
                put(&xxh3.to_le_bytes());
            }
            Message::Prepare { epoch, state_len, state_hash } => {
                put(&epoch.to_le_bytes());
                put(&state_len.to_le_bytes());
                put(&state_hash.to_le_bytes());
            }
            Message::Ready | Message::Commit | Message::DigestsEnd | Message::Bye => {}
            Message::Running { report } => put(report),
            Message::Digests { region, first_page, digests } => {
                put(&region.to_le_bytes());
                put(&first_page.to_le_bytes());
                digests.iter().for_each(|digest| put(&digest.to_le_bytes()));
            }
            Message::Cancel { reason } => put_text(reason, out),
            Message::Error { code, message } => {
                put(&code.number().to_le_bytes());
                put_text(message, out);
            }
            Message::Ping { id } | Message::Pong { id } => put(&id.to_le_bytes()),
            Message::Damaged { epoch, region, pages, reason } => {
                put(&epoch.to_le_bytes());
                put(&region.to_le_bytes());
                // `check` bounded it.
                put(&(pages.len() as u32).to_le_bytes());
                pages.iter().for_each(|page| put(&page.to_le_bytes()));
                put_text(reason, out);
            }
        }
        Ok(())
    }

    /// Reads the body of a frame of this kind, whose length is within the bounds of the kind.
    pub(crate) fn decode(kind: Kind, body: &[u8], limits: &Limits) -> Result<Message, WireError> {
        let mut from = Cursor::new("the body of a control frame", body);
        let message = match kind {
            Kind::Hello => Message::Hello(decode_hello(&mut from)?),
            Kind::HelloAck => Message::HelloAck { version: from.u16()? },
            Kind::Offer => Message::Offer(decode_offer(&mut from)?),
            Kind::Accept => {
                let encodings = from.u16()?;
                reserved(from.u16()?)?;
                let (history_slots, max_batch_pages) = (from.u32()?, from.u32()?);
                Message::Accept(Accept { encodings, history_slots, max_batch_pages })
            }
            Kind::EpochStart => Message::EpochStart { epoch: from.u32()?, pages: from.u64()? },
            Kind::Batch => return Err(malformed("a message", kind, "any kind but Batch")),
            Kind::Barrier => {
                Message::Barrier { epoch: from.u32()?, batches: from.u64()?, pages: from.u64()? }
            }
            Kind::EpochDone => Message::EpochDone { epoch: from.u32()? },
            Kind::Ack => {
                Message::Ack(Ack { batches: from.u64()?, wire_bytes: from.u64()?, pages: from.u64()? })
            }
            Kind::DeviceState => Message::DeviceState {
                total_len: from.u64()?,
                offset: from.u64()?,
                bytes: from.rest().to_vec(),
            },
            Kind::StateEnd => Message::StateEnd { len: from.u64()?, xxh3: from.u64()? },
            Kind::Prepare => {
                Message::Prepare { epoch: from.u32()?, state_len: from.u64()?, state_hash: from.u64()? }
            }
            Kind::Ready => Message::Ready,
            Kind::Commit => Message::Commit,
            Kind::Running => Message::Running { report: from.rest().to_vec() },
            Kind::Digests => {
                let (region, first_page) = (from.u32()?, from.u64()?);
                let (digests, odd) = from.rest().as_chunks();
                if !odd.is_empty() {
                    return Err(malformed("the digests", format_args!("{} odd bytes", odd.len()), "none"));
                }
                let digests = digests.iter().copied().map(u64::from_le_bytes).collect();
                Message::Digests { region, first_page, digests }
            }
            Kind::DigestsEnd => Message::DigestsEnd,
            Kind::Bye => Message::Bye,
            Kind::Cancel => Message::Cancel { reason: text(from.rest())? },
            Kind::Error => {
                Message::Error { code: ErrorCode::from_number(from.u16()?), message: text(from.rest())? }
            }
            Kind::Ping => Message::Ping { id: from.u64()? },
            Kind::Pong => Message::Pong { id: from.u64()? },
            Kind::Damaged => {
                let (epoch, region, count) = (from.u32()?, from.u32()?, from.u32()?);
                check_damaged_count(u64::from(count))?;
                let (pages, _) = from.bytes(8 * count as usize)?.as_chunks();
                let pages = pages.iter().copied().map(u64::from_le_bytes).collect();
                Message::Damaged { epoch, region, pages, reason: text(from.rest())? }
            }
        };
        from.end()?;
        message.check(limits)?;
        Ok(message)
    }

    /// The rules for the values of a message, the same for what is sent and what is received.
    fn check(&self, limits: &Limits) -> Result<(), WireError> {
        match self {
            Message::Hello(hello) => check_hello(hello),
            Message::Offer(offer) => check_offer(offer, limits),
            Message::Accept(accept) => {
                check_encodings(accept.encodings)?;
                check_batch_pages(accept.max_batch_pages)
            }
            Message::DeviceState { total_len, offset, bytes } => {
                at_most("the device state", *total_len, limits.max_state_len.min(MAX_STATE_LEN))?;
                at_most("a piece of device state", bytes.len() as u64, MAX_STATE_CHUNK as u64)?;
                if bytes.is_empty() {
                    return Err(malformed("a piece of device state", "no bytes", "at least one"));
                }
                at_most(
                    "the end of a piece of device state",
                    offset.saturating_add(bytes.len() as u64),
                    *total_len,
                )
            }
            Message::StateEnd { len, .. } | Message::Prepare { state_len: len, .. } => {
                at_most("the device state", *len, limits.max_state_len.min(MAX_STATE_LEN))
            }
            Message::Running { report } => at_most("the report", report.len() as u64, MAX_REPORT_LEN as u64),
            Message::Digests { digests, .. } => {
                if digests.is_empty() {
                    return Err(malformed("the digests", "none", "at least one"));
                }
                at_most("the number of digests", digests.len() as u64, MAX_DIGESTS as u64)
            }
            Message::Damaged { pages, .. } => {
                check_damaged_count(pages.len() as u64)?;
                match pages.is_sorted_by(|a, b| a < b) {
                    true => Ok(()),
                    false => Err(malformed(
                        "the pages of a damaged batch",
                        "pages out of order",
                        "ascending pages",
                    )),
                }
            }
            _ => Ok(()),
        }
    }
}

fn check_damaged_count(count: u64) -> Result<(), WireError> {
    if count == 0 {
        return Err(malformed("the pages of a damaged batch", "none", "at least one"));
    }
    at_most("the number of pages of a damaged batch", count, MAX_BATCH_PAGES.into())
}

fn decode_hello(from: &mut Cursor<'_>) -> Result<Hello, WireError> {
    let (min_version, max_version) = (from.u16()?, from.u16()?);
    let role = from.u8()?;
    reserved(from.u8()?.into())?;
    let role = match (role, from.u16()?) {
        (0, 0) => Role::Control,
        (0, index) => return Err(malformed("index of a control connection", index, 0)),
        (1, index) => Role::Data { index },
        (role, _) => return Err(malformed("role of a connection", role, "0 or 1")),
    };
    Ok(Hello { min_version, max_version, role, session: from.array()? })
}

fn check_hello(hello: &Hello) -> Result<(), WireError> {
    if hello.min_version == 0 || hello.min_version > hello.max_version {
        let seen = format_args!("{} to {}", hello.min_version, hello.max_version).to_string();
        return Err(malformed("version range", seen, "from at least 1 to no less"));
    }
    match hello.role {
        Role::Data { index } if index >= MAX_CONNECTIONS => {
            at_most("index of a data connection", index.into(), u64::from(MAX_CONNECTIONS) - 1)
        }
        _ => Ok(()),
    }
}

fn encode_offer(offer: &Offer, out: &mut Vec<u8>) {
    let mut put = |bytes: &[u8]| out.extend_from_slice(bytes);
    put(&offer.page_size.to_le_bytes());
    put(&offer.encodings.to_le_bytes());
    put(&offer.connections.to_le_bytes());
    put(&offer.history_slots.to_le_bytes());
    put(&offer.max_batch_pages.to_le_bytes());
    put(&offer.downtime_limit_ms.to_le_bytes());
    put(&[offer.pipeline.into(), offer.verify.into()]);
    // `check` bounded these three: 64, 64 and 2^20.
    put(&[offer.vm_name.len() as u8, offer.regions.len() as u8]);
    put(&(offer.machine.len() as u32).to_le_bytes());
    put(offer.vm_name.as_bytes());
    for region in &offer.regions {
        put(&region.id.to_le_bytes());
        put(&region.pages.to_le_bytes());
        put(&[region.name.len() as u8]);
        put(region.name.as_bytes());
    }
    put(&offer.machine);
}

fn decode_offer(from: &mut Cursor<'_>) -> Result<Offer, WireError> {
    let page_size = from.u32()?;
    let encodings = from.u16()?;
    let connections = from.u16()?;
    let history_slots = from.u32()?;
    let max_batch_pages = from.u32()?;
    let downtime_limit_ms = from.u32()?;
    let pipeline = from.bool("the flag `pipeline`")?;
    let verify = from.bool("the flag `verify`")?;
    let name_len = from.u8()?;
    let region_count = from.u8()?;
    let machine_len = from.u32()?;
    at_most("the number of regions", region_count.into(), MAX_REGIONS as u64)?;
    let vm_name = name(from, name_len)?;
    let mut regions = Vec::with_capacity(region_count.into());
    for _ in 0..region_count {
        let (id, pages) = (from.u32()?, from.u64()?);
        let name_len = from.u8()?;
        regions.push(Region { id, name: name(from, name_len)?, pages });
    }
    let machine = from.bytes(machine_len as usize)?.to_vec();
    Ok(Offer {
        vm_name,
        page_size,
        regions,
        encodings,
        history_slots,
        max_batch_pages,
        connections,
        pipeline,
        verify,
        downtime_limit_ms,
        machine,
    })
}

fn check_offer(offer: &Offer, limits: &Limits) -> Result<(), WireError> {
    check_name("the VM's name", &offer.vm_name)?;
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    if !offer.vm_name.bytes().all(allowed) || offer.vm_name.starts_with(['.', '-']) {
        let expected = "A-Z a-z 0-9 . _ -, not starting with . or -";
        return Err(malformed("the VM's name", offer.vm_name.escape_debug(), expected));
    }
    if offer.page_size != crate::PAGE_SIZE {
        return Err(malformed("page size", offer.page_size, crate::PAGE_SIZE));
    }
    at_most("the number of regions", offer.regions.len() as u64, MAX_REGIONS as u64)?;
    if offer.regions.is_empty() {
        return Err(malformed("the regions", "none", "at least one"));
    }
    let mut total = 0u64;
    for (i, region) in offer.regions.iter().enumerate() {
        check_name("a region's name", &region.name)?;
        let earlier = &offer.regions[..i];
        if earlier.iter().any(|e| e.name == region.name) {
            return Err(malformed("a region's name", &region.name, "a name that no other region has"));
        }
        if earlier.last().is_some_and(|e| e.id >= region.id) {
            return Err(malformed("the ids of the regions", region.id, "ascending ids"));
        }
        if region.pages == 0 {
            return Err(malformed("a region's size", "0 pages", "at least 1"));
        }
        total = total.saturating_add(region.pages);
    }
    at_most("guest memory in pages", total, limits.max_guest_pages)?;
    check_encodings(offer.encodings)?;
    check_batch_pages(offer.max_batch_pages)?;
    if offer.connections == 0 {
        return Err(malformed("the number of data connections", 0, "at least 1"));
    }
    at_most("the number of data connections", offer.connections.into(), MAX_CONNECTIONS.into())?;
    at_most("the machine description", offer.machine.len() as u64, MAX_MACHINE_LEN as u64)
}

fn check_encodings(encodings: u16) -> Result<(), WireError> {
    if encodings & RAW_BIT == 0 {
        return Err(malformed("the encodings", format_args!("{encodings:#06x}"), "a set with raw (bit 2)"));
    }
    Ok(())
}

fn check_batch_pages(pages: u32) -> Result<(), WireError> {
    if pages == 0 {
        return Err(malformed("the largest batch in pages", 0, "at least 1"));
    }
    at_most("the largest batch in pages", pages.into(), MAX_BATCH_PAGES.into())
}

fn check_name(what: &'static str, name: &str) -> Result<(), WireError> {
    at_most(what, name.len() as u64, MAX_NAME_LEN as u64)?;
    if name.is_empty() || !name.bytes().all(|b| b.is_ascii_graphic()) {
        return Err(malformed(
            what,
            name.escape_debug(),
            "1 to 64 printable ASCII characters without spaces",
        ));
    }
    Ok(())
}

fn name(from: &mut Cursor<'_>, len: u8) -> Result<String, WireError> {
    at_most("a name", len.into(), MAX_NAME_LEN as u64)?;
    let bytes = from.bytes(len.into())?;
    String::from_utf8(bytes.to_vec()).map_err(|_| malformed("a name", bytes.escape_ascii(), "ASCII"))
}

fn reserved(seen: u16) -> Result<(), WireError> {
    if seen == 0 { Ok(()) } else { Err(malformed("reserved bytes", seen, 0)) }
}

/// Appends `text`, made fit: an end that gives up must always be able to say why.
fn put_text(text: &str, out: &mut Vec<u8>) {
    let start = out.len();
    for c in text.chars() {
        let c = if misleads(c) { ' ' } else { c };
        if out.len() - start + c.len_utf8() > MAX_TEXT_LEN {
            break;
        }
        out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes());
    }
}

/// Text that is safe to print on a terminal.
fn text(bytes: &[u8]) -> Result<String, WireError> {
    at_most("a text", bytes.len() as u64, MAX_TEXT_LEN as u64)?;
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains(misleads) => Ok(text.to_owned()),
        _ => {
            Err(malformed("a text", bytes.escape_ascii(), "UTF-8 without characters that control or mislead"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_of_a_peer_cannot_mislead() {
        assert_eq!(text("größer".as_bytes()).unwrap(), "größer");
        for wrong in ["a\x1b[31m", "a\u{2028}b", "a\u{202e}b"] {
            assert!(text(wrong.as_bytes()).is_err(), "{wrong:?}");
        }
    }
}
