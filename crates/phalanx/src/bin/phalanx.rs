//! The `phalanx` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    phalanx::main()
}
