//! Max-min fair rates.

/// The rates of flows that are connected through the links they share.
///
/// Progressive filling: the link with the least left for each of its flows sets their rate; what
/// they take elsewhere is gone there; and so on with the flows that remain (Bertsekas and Gallager,
/// "Data Networks", 6.5.2). Where every flow's tightest link is the tightest for all flows on it,
/// as it is when all are alike, that is one round over the flows.
#[derive(Debug, Default)]
pub(super) struct Fair {
    /// By link: what is left, and how many flows without a rate.
    left: Vec<f64>,
    open: Vec<u32>,
}

impl Fair {
    /// The rate of each flow, in order: `ways` has the links of each, `capacity` is by link.
    pub(super) fn rates<'a>(
        &mut self,
        capacity: &[f64],
        links: &[u32],
        ways: &[&'a [u32]],
        rates: &mut Vec<f64>,
    ) {
        self.left.resize(capacity.len(), 0.0);
        self.open.resize(capacity.len(), 0);
        for &link in links {
            self.left[link as usize] = capacity[link as usize];
            self.open[link as usize] = 0;
        }
        ways.iter().flat_map(|way| way.iter()).for_each(|link| self.open[*link as usize] += 1);
        rates.clear();
        rates.extend(ways.iter().map(|way| self.share(way)));
        if !self.all_fill_their_tightest(ways, rates) {
            self.fill(capacity, links, ways, rates);
        }
    }

    /// The least that an equal share of each of these links is.
    fn share(&self, way: &[u32]) -> f64 {
        let shares =
            way.iter().map(|link| self.left[*link as usize] / f64::from(self.open[*link as usize]));
        shares.fold(f64::INFINITY, f64::min)
    }

    /// Whether the shares are max-min fair as they are: every flow has a link that is full, and on
    /// which nobody has more.
    fn all_fill_their_tightest(&self, ways: &[&[u32]], rates: &[f64]) -> bool {
        let same = |link: u32, rate: f64| {
            let share = self.left[link as usize] / f64::from(self.open[link as usize]);
            share == rate
        };
        // A flow below its share on a link leaves something for the others there.
        let tight = |way: &[u32], rate: f64| {
            way.iter().all(|link| same(*link, rate) || self.open[*link as usize] == 1)
        };
        ways.iter().zip(rates).all(|(way, rate)| tight(way, *rate))
    }

    fn fill(&mut self, capacity: &[f64], links: &[u32], ways: &[&[u32]], rates: &mut [f64]) {
        for &link in links {
            self.left[link as usize] = capacity[link as usize];
        }
        let mut open: Vec<usize> = (0..ways.len()).collect();
        while !open.is_empty() {
            let share =
                open.iter().map(|flow| self.share(ways[*flow])).fold(f64::INFINITY, f64::min);
            // Equal shares may differ by rounding.
            let tight = |fair: &Self, flow: usize| fair.share(ways[flow]) <= share * (1.0 + 1e-12);
            let (set, rest): (Vec<usize>, Vec<usize>) =
                open.into_iter().partition(|flow| tight(self, *flow));
            for flow in set {
                rates[flow] = share;
                for link in ways[flow] {
                    self.left[*link as usize] = (self.left[*link as usize] - share).max(0.0);
                    self.open[*link as usize] -= 1;
                }
            }
            open = rest;
        }
    }
}
