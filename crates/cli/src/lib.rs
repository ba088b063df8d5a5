//! What the `pagewarp` binary is made of: the command line, the commands, and the demo, which the tests use as well.
//!
//! Flow: [`args`] parses what was typed, a module of [`commands`] turns it into ready objects and does it, [`exit`] turns what went wrong
//! into one line and a number.
#![forbid(unsafe_code)]

pub mod address;
pub mod args;
pub mod backend;
pub mod commands;
pub mod demo;
pub mod exit;
pub mod net;
pub mod output;
pub mod progress;
pub mod protect;
pub mod report;
pub mod sandbox;
pub mod table;
pub mod trace;
pub mod units;
pub mod vm;
