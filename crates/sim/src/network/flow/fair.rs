//! Max-min fair rates.

/// The rates of flows that are connected through the links they share.
///
/// Progressive filling: the link with the least left for each of its flows sets their rate; what
/// they take elsewhere is gone there; and so on with the flows that remain (Bertsekas and Gallager,
/// "Data Networks", 6.5.2). Where every flow's tightest link is the tightest for all flows on it,
/// as it is when all are alike, that is one round over the flows.
#[derive(Debug, Default)]
pub(super) struct Fair {
    /// By link: what is left, how many flows have no rate, and an equal share of the one for each of
    /// the other.
    left: Vec<f64>,
    open: Vec<u32>,
    share: Vec<f64>,
}

impl Fair {
    /// The rate of each flow, in order: `ways` has the links of each, `capacity` is by link.
    pub(super) fn rates(
        &mut self,
        capacity: &[f64],
        links: &[u32],
        ways: &[&[u32]],
        rates: &mut Vec<f64>,
    ) {
        self.left.resize(capacity.len(), 0.0);
        self.open.resize(capacity.len(), 0);
        self.share.resize(capacity.len(), 0.0);
        for &link in links {
            self.open[link as usize] = 0;
        }
        ways.iter().flat_map(|way| way.iter()).for_each(|link| self.open[*link as usize] += 1);
        for &link in links {
            self.left[link as usize] = capacity[link as usize];
            self.set_share(link);
        }
        rates.clear();
        rates.extend(ways.iter().map(|way| self.least_share(way)));
        if !self.all_fill_their_tightest(ways, rates) {
            self.fill(ways, rates);
        }
    }

    fn set_share(&mut self, link: u32) {
        let link = link as usize;
        self.share[link] = self.left[link] / f64::from(self.open[link]);
    }

    /// The least that an equal share of each of these links is.
    fn least_share(&self, way: &[u32]) -> f64 {
        way.iter().map(|link| self.share[*link as usize]).fold(f64::INFINITY, f64::min)
    }

    /// Whether the shares are max-min fair as they are: every link of every flow is either full with
    /// flows that have no more than it, or its own.
    fn all_fill_their_tightest(&self, ways: &[&[u32]], rates: &[f64]) -> bool {
        let good = |link: u32, rate: f64| {
            self.share[link as usize] == rate || self.open[link as usize] == 1
        };
        let mut flows = ways.iter().zip(rates);
        flows.all(|(way, rate)| way.iter().all(|link| good(*link, *rate)))
    }

    fn fill(&mut self, ways: &[&[u32]], rates: &mut [f64]) {
        let mut open: Vec<usize> = (0..ways.len()).collect();
        while !open.is_empty() {
            let least = open.iter().map(|flow| self.least_share(ways[*flow]));
            let share = least.fold(f64::INFINITY, f64::min);
            // Equal shares may differ by rounding.
            let tight = |flow: &usize| self.least_share(ways[*flow]) <= share * (1.0 + 1e-12);
            let (set, rest): (Vec<usize>, Vec<usize>) = open.into_iter().partition(tight);
            for flow in set {
                rates[flow] = share;
                for &link in ways[flow] {
                    self.left[link as usize] = (self.left[link as usize] - share).max(0.0);
                    self.open[link as usize] -= 1;
                    self.set_share(link);
                }
            }
            open = rest;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LINKS: u32 = 8;

    fn rates(capacity: &[f64], ways: &[Vec<u32>]) -> Vec<f64> {
        let links: Vec<u32> = (0..LINKS).collect();
        let ways: Vec<&[u32]> = ways.iter().map(Vec::as_slice).collect();
        let mut rates = Vec::new();
        Fair::default().rates(capacity, &links, &ways, &mut rates);
        rates
    }

    #[test]
    fn what_a_flow_cannot_use_goes_to_the_others() {
        // Three flows enter link 3, so the first leaves most of link 0 to the second.
        let ways = [vec![0, 3], vec![0, 4], vec![1, 3], vec![2, 3]];
        assert_eq!(rates(&[6.0; 8], &ways), [2.0, 4.0, 2.0, 2.0]);
        assert_eq!(rates(&[6.0; 8], &[vec![0, 1], vec![1, 2]]), [3.0, 3.0]);
    }

    proptest! {
        /// The definition: no flow could have more without one that has no more having less. That
        /// is, every flow has a full link on which none has more than it.
        #[test]
        fn rates_are_feasible_and_max_min_fair(
            capacity in prop::collection::vec(0.5_f64..10.0, LINKS as usize),
            ways in prop::collection::vec(
                prop::sample::subsequence((0..LINKS).collect::<Vec<_>>(), 1..4), 1..30),
        ) {
            let rates = rates(&capacity, &ways);
            let on = |link: u32| {
                let flows = ways.iter().zip(&rates).filter(move |(way, _)| way.contains(&link));
                flows.map(|(_, rate)| *rate)
            };
            for link in 0..LINKS {
                prop_assert!(on(link).sum::<f64>() <= capacity[link as usize] * (1.0 + 1e-9));
            }
            for (way, rate) in ways.iter().zip(&rates) {
                let full = |link: &u32| {
                    let all: f64 = on(*link).sum();
                    all >= capacity[*link as usize] * (1.0 - 1e-9)
                        && on(*link).all(|other| other <= rate * (1.0 + 1e-9))
                };
                prop_assert!(way.iter().any(full), "{:?} at {}", way, rate);
            }
        }
    }
}
