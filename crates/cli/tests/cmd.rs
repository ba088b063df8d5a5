//! What the program says: help, and one-line errors with their exit codes. The transcripts are in `tests/cmd`;
//! `TRYCMD=overwrite cargo test -p pagewarp --test cmd` writes them anew.

#[test]
fn transcripts() {
    trycmd::TestCases::new()
        .env("COLUMNS", "100")
        .env("PAGEWARP_RUN_DIR", "/nonexistent/pagewarp")
        .case("tests/cmd/*.trycmd");
}
