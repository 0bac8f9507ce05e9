//! What local ranks compute on.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// A device of this machine, as the job file names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceName {
    /// The processor.
    #[default]
    Cpu,
    /// The processor, through Burn's tensors.
    BurnFlex,
    /// An NVIDIA GPU for each rank of the host.
    Cuda,
    /// An AMD GPU for each rank of the host.
    Rocm,
    /// A GPU for each rank of the host, through Vulkan.
    Vulkan,
    /// Apple's GPU.
    Metal,
}

impl DeviceName {
    /// The feature a build needs for it, and whether this one has it.
    fn feature(self) -> (&'static str, bool) {
        match self {
            Self::Cpu => ("default", true),
            Self::BurnFlex => ("burn", cfg!(feature = "burn")),
            Self::Cuda => ("burn-cuda", cfg!(feature = "burn-cuda")),
            Self::Rocm => ("burn-rocm", cfg!(feature = "burn-rocm")),
            Self::Vulkan => ("burn-vulkan", cfg!(feature = "burn-vulkan")),
            Self::Metal => ("burn-metal", cfg!(feature = "burn-metal")),
        }
    }

    /// Refuses a device that this build, or its arithmetic, does not have.
    pub fn check(self, precision: compute::Precision) -> Result<()> {
        let (feature, built) = self.feature();
        ensure!(
            built,
            "[cluster] device: this build has no such device; build it with `cargo build --release --features {feature}`"
        );
        ensure!(
            self == Self::Cpu || precision == compute::Precision::Fp32,
            "[training] precision = \"bf16\" is not available on this [cluster] device yet; choose \"fp32\""
        );
        Ok(())
    }
}
