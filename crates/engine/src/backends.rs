//! Encoders and decoders for a migration: of the backend that was asked for, or of the CPU if that one cannot work.

use pagewarp_codec::{
    Backend, BackendError, CpuBackend, Decoder, DecoderConfig, Encoder, EncoderConfig, SharedBackend,
};
use tracing::warn;

/// Encoders, and what they were made for.
pub struct Encoders {
    /// With the history slots that the backend can have.
    pub config: EncoderConfig,
    /// One for each thread, at least one.
    pub encoders: Vec<Box<dyn Encoder>>,
    /// Why the CPU had to take over, if it had to.
    pub fallback: Option<String>,
}

/// Decoders, and what they were made for.
pub struct Decoders {
    /// With the history slots that the backend can have.
    pub config: DecoderConfig,
    /// One for each thread, at least one.
    pub decoders: Vec<Box<dyn Decoder>>,
    /// Why the CPU had to take over, if it had to.
    pub fallback: Option<String>,
}

/// Sets up encoders for up to `workers` threads. The backend says how many of the history slots in `wanted` it can have.
pub fn encoders(
    backend: &SharedBackend,
    wanted: EncoderConfig,
    workers: usize,
) -> Result<Encoders, BackendError> {
    let history_slots = backend.history_slots(wanted.history_slots).min(wanted.history_slots);
    let config = EncoderConfig { history_slots, ..wanted };
    match backend.encoders(config, workers) {
        Ok(encoders) => Ok(Encoders { config, encoders, fallback: None }),
        Err(error) => {
            warn!(%error, "starting with the CPU backend instead");
            let encoders = CpuBackend::new().encoders(wanted, workers)?;
            Ok(Encoders { config: wanted, encoders, fallback: Some(error.to_string()) })
        }
    }
}

/// Sets up decoders for up to `workers` threads. The backend says how many of the history slots in `wanted` it can have; the CPU has none.
pub fn decoders(
    backend: &SharedBackend,
    wanted: DecoderConfig,
    workers: usize,
) -> Result<Decoders, BackendError> {
    let history_slots = backend.decode_history_slots(wanted.history_slots).min(wanted.history_slots);
    let config = DecoderConfig { history_slots, ..wanted };
    match backend.decoders(config, workers) {
        Ok(decoders) => Ok(Decoders { config, decoders, fallback: None }),
        Err(error) => {
            warn!(%error, "starting with the CPU backend instead");
            let config = DecoderConfig { history_slots: 0, ..wanted };
            let decoders = CpuBackend::new().decoders(config, workers)?;
            Ok(Decoders { config, decoders, fallback: Some(error.to_string()) })
        }
    }
}

/// An encoder of the CPU backend.
pub fn cpu_encoder(config: EncoderConfig) -> Result<Box<dyn Encoder>, BackendError> {
    let encoders = CpuBackend::new().encoders(config, 1)?;
    Ok(encoders.into_iter().next().expect("a backend makes at least one"))
}

/// A decoder of the CPU backend.
pub fn cpu_decoder(config: DecoderConfig) -> Result<Box<dyn Decoder>, BackendError> {
    let decoders = CpuBackend::new().decoders(config, 1)?;
    Ok(decoders.into_iter().next().expect("a backend makes at least one"))
}
