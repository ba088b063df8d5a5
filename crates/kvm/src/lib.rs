//! A reference virtual machine monitor on KVM that migrates through pagewarp.

pub mod control;
