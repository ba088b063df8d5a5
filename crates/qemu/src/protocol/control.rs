//! What `pagewarp qemu migrate` and `pagewarp qemu receive` say to each other, in JSON, on a connection of their own.
