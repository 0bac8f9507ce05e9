//! Phalanx for Python: the native half of the package `phalanx`.

mod commands;
mod communicator;
mod patience;

use pyo3::prelude::*;

/// What Phalanx says is wrong, in the words of the command line.
mod error {
    pyo3::create_exception!(phalanx, Error, pyo3::exceptions::PyRuntimeError);
}

/// What the Python half imports.
#[pymodule]
fn _phalanx(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("Error", module.py().get_type::<error::Error>())?;
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_function(wrap_pyfunction!(commands::answer, module)?)?;
    module.add_class::<communicator::Listener>()?;
    module.add_class::<communicator::Communicator>()?;
    module.add_class::<communicator::Batch>()?;
    module.add_class::<communicator::Completions>()
}
