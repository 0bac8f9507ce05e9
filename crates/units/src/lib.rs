//! Quantities as distinct types: bytes, floating-point operations, durations, rates, power, ranks.
//!
//! A function that takes [`Bytes`] cannot be handed a FLOP count, and a number is printed with its
//! unit in one way only. The crate knows no noun of any domain above arithmetic.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Div, Mul, Sub};

use serde::{Deserialize, Serialize};

/// Declares a quantity: a number with a unit, its sums and differences, and its scaling.
macro_rules! quantity {
    ($(#[$meta:meta])* $name:ident($inner:ty), zero $zero:expr) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, PartialOrd, Default, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $inner);

        impl $name {
            /// None of it.
            pub const ZERO: Self = Self($zero);

            /// The value as a floating-point number, for rates and ratios.
            #[must_use]
            #[allow(clippy::unnecessary_cast, reason = "one body serves integers and floats")]
            pub fn as_f64(self) -> f64 {
                self.0 as f64
            }
        }

        impl Add for $name {
            type Output = Self;
            fn add(self, other: Self) -> Self {
                Self(self.0 + other.0)
            }
        }

        impl AddAssign for $name {
            fn add_assign(&mut self, other: Self) {
                self.0 += other.0;
            }
        }

        impl Sub for $name {
            type Output = Self;
            fn sub(self, other: Self) -> Self {
                Self(self.0 - other.0)
            }
        }

        impl Mul<$inner> for $name {
            type Output = Self;
            fn mul(self, factor: $inner) -> Self {
                Self(self.0 * factor)
            }
        }

        impl Sum for $name {
            fn sum<I: Iterator<Item = Self>>(iter: I) -> Self {
                iter.fold(Self::ZERO, Add::add)
            }
        }

        /// The ratio of two amounts of the same quantity.
        impl Div for $name {
            type Output = f64;
            fn div(self, other: Self) -> f64 {
                self.as_f64() / other.as_f64()
            }
        }
    };
}

quantity!(
    /// A size in memory or on a wire.
    #[derive(Eq, Ord, Hash)]
    Bytes(u64), zero 0
);
quantity!(
    /// A count of floating-point operations; a multiply and its add are two.
    #[derive(Eq, Ord, Hash)]
    Flops(u64), zero 0
);
quantity!(
    /// A duration, real or virtual.
    Seconds(f64), zero 0.0
);
quantity!(
    /// A bandwidth.
    BytesPerSecond(f64), zero 0.0
);
quantity!(
    /// A compute rate.
    FlopsPerSecond(f64), zero 0.0
);
quantity!(
    /// A frequency.
    Hertz(f64), zero 0.0
);
quantity!(
    /// A power.
    Watts(f64), zero 0.0
);
quantity!(
    /// An energy.
    Joules(f64), zero 0.0
);

impl Mul<Seconds> for Watts {
    type Output = Joules;
    fn mul(self, time: Seconds) -> Joules {
        Joules(self.0 * time.0)
    }
}

impl Div<BytesPerSecond> for Bytes {
    type Output = Seconds;
    fn div(self, rate: BytesPerSecond) -> Seconds {
        Seconds(self.as_f64() / rate.0)
    }
}

impl Div<Seconds> for Bytes {
    type Output = BytesPerSecond;
    fn div(self, time: Seconds) -> BytesPerSecond {
        BytesPerSecond(self.as_f64() / time.0)
    }
}

impl Div<FlopsPerSecond> for Flops {
    type Output = Seconds;
    fn div(self, rate: FlopsPerSecond) -> Seconds {
        Seconds(self.as_f64() / rate.0)
    }
}

impl Div<Seconds> for Flops {
    type Output = FlopsPerSecond;
    fn div(self, time: Seconds) -> FlopsPerSecond {
        FlopsPerSecond(self.as_f64() / time.0)
    }
}

impl Seconds {
    /// The middle one of several durations, the upper of two; zero of none.
    #[must_use]
    pub fn median(mut times: Vec<Self>) -> Self {
        times.sort_by(|a, b| a.0.total_cmp(&b.0));
        times.get(times.len() / 2).copied().unwrap_or_default()
    }

    /// The longer of two durations.
    #[must_use]
    pub fn max(self, other: Self) -> Self {
        Self(self.0.max(other.0))
    }
}

/// One process of a job, numbered from 0.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct Rank(pub u32);

impl Rank {
    /// The rank as an index into a slice with one entry per rank.
    #[must_use]
    pub fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for Rank {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {}", self.0)
    }
}

/// Prints `value` with the largest prefix of `prefixes` (each `base` times the one before) that
/// leaves it at 1 or above.
fn scaled(
    f: &mut fmt::Formatter<'_>,
    mut value: f64,
    base: f64,
    prefixes: &[&str],
    unit: &str,
) -> fmt::Result {
    let mut index = 0;
    while value.abs() >= base && index + 1 < prefixes.len() {
        value /= base;
        index += 1;
    }
    let decimals = f.precision().unwrap_or(if index == 0 { 0 } else { 2 });
    write!(f, "{value:.decimals$} {}{unit}", prefixes[index])
}

const DECIMAL: [&str; 7] = ["", "k", "M", "G", "T", "P", "E"];
const BINARY: [&str; 6] = ["", "Ki", "Mi", "Gi", "Ti", "Pi"];

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        scaled(f, self.as_f64(), 1024.0, &BINARY, "B")
    }
}

impl fmt::Display for Flops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        scaled(f, self.as_f64(), 1e3, &DECIMAL, "FLOP")
    }
}

impl fmt::Display for BytesPerSecond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        scaled(f, self.0, 1e3, &DECIMAL, "B/s")
    }
}

impl fmt::Display for FlopsPerSecond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        scaled(f, self.0, 1e3, &DECIMAL, "FLOP/s")
    }
}

impl fmt::Display for Hertz {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        scaled(f, self.0, 1e3, &DECIMAL, "Hz")
    }
}

impl fmt::Display for Watts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        scaled(f, self.0, 1e3, &DECIMAL, "W")
    }
}

impl fmt::Display for Joules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        scaled(f, self.0, 1e3, &DECIMAL, "J")
    }
}

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (value, unit) = match self.0.abs() {
            t if t >= 1.0 || t == 0.0 => (self.0, "s"),
            t if t >= 1e-3 => (self.0 * 1e3, "ms"),
            t if t >= 1e-6 => (self.0 * 1e6, "us"),
            _ => (self.0 * 1e9, "ns"),
        };
        let decimals = f.precision().unwrap_or(2);
        write!(f, "{value:.decimals$} {unit}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_print_with_their_unit() {
        assert_eq!(Bytes(512).to_string(), "512 B");
        assert_eq!(Bytes(3 << 30).to_string(), "3.00 GiB");
        assert_eq!(Flops(989_000_000_000_000).to_string(), "989.00 TFLOP");
        assert_eq!(Seconds(0.0123).to_string(), "12.30 ms");
        assert_eq!(format!("{:.0}", BytesPerSecond(50e9)), "50 GB/s");
        assert_eq!(Hertz(1.83e9).to_string(), "1.83 GHz");
        assert_eq!((Watts(700.0) * Seconds(10.0)).to_string(), "7.00 kJ");
    }

    #[test]
    fn rates_divide_amounts_into_durations() {
        assert_eq!(Bytes(100) / BytesPerSecond(50.0), Seconds(2.0));
        assert_eq!(Flops(90) / Seconds(3.0), FlopsPerSecond(30.0));
        assert_eq!([Bytes(1), Bytes(2)].into_iter().sum::<Bytes>(), Bytes(3));
    }
}
