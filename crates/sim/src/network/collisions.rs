//! Flows that a hash puts on links: how full the fullest link is.

/// Above this many flows the exact sum is replaced by its Poisson limit.
const EXACT: u32 = 64;

/// How many flows the fullest link carries, on average, when each switch of `switches` puts each of
/// its `flows` flows on one of its `links` links by chance.
///
/// The chance that no link of a switch has more than m flows is exactly
/// `flows! / links^flows * [x^flows] (sum of x^j / j! for j up to m)^links`; with many flows, links
/// fill independently (Poisson). The mean of the largest is the sum over m of the chance that it is
/// above m.
pub(super) fn fullest(flows: u32, links: u32, switches: u32) -> f64 {
    if flows == 0 || links == 0 || switches == 0 {
        return 0.0;
    }
    let mut mean = 0.0;
    for most in 0..flows {
        let within = if flows <= EXACT {
            none_above(most, flows, links)
        } else {
            poisson_up_to(most, f64::from(flows) / f64::from(links)).powf(f64::from(links))
        };
        let above = 1.0 - within.powf(f64::from(switches));
        mean += above;
        if above < 1e-9 {
            break;
        }
    }
    mean
}

/// The chance that no link has more than `most` flows, link by link: of the flows that are left,
/// each takes this link with a chance of 1 in as many as are left.
fn none_above(most: u32, flows: u32, links: u32) -> f64 {
    let flows = flows as usize;
    // The chance that the links so far have no more than `most` each, by the flows left over.
    let mut left = vec![0.0; flows + 1];
    left[flows] = 1.0;
    for link in 0..links {
        let share = 1.0 / f64::from(links - link);
        let mut next = vec![0.0; flows + 1];
        for (flows, chance) in left.iter().enumerate().filter(|(_, chance)| **chance > 0.0) {
            for (taken, binomial) in binomials(flows, share).take(most as usize + 1).enumerate() {
                next[flows - taken] += chance * binomial;
            }
        }
        left = next;
    }
    left[0]
}

/// The chances of 0, 1, ... successes among `tries`.
fn binomials(tries: usize, share: f64) -> impl Iterator<Item = f64> {
    let certain = share >= 1.0;
    let first = if certain { 0.0 } else { (1.0 - share).powi(tries as i32) };
    let mut chance = first;
    (0..=tries).map(move |successes| {
        if certain {
            return f64::from(u8::from(successes == tries));
        }
        if successes > 0 {
            chance *= (tries - successes + 1) as f64 / successes as f64 * share / (1.0 - share);
        }
        chance
    })
}

/// The chance that a Poisson variable is at most `most`.
fn poisson_up_to(most: u32, mean: f64) -> f64 {
    let (mut term, mut sum) = ((-mean).exp(), 0.0);
    for count in 0..=most {
        if count > 0 {
            term *= mean / f64::from(count);
        }
        sum += term;
    }
    sum.min(1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every way to put the flows on links, one by one.
    fn counted(flows: u32, links: u32) -> f64 {
        let ways = links.pow(flows);
        let fullest = |mut way: u32| {
            let mut loads = vec![0_u32; links as usize];
            for _ in 0..flows {
                loads[(way % links) as usize] += 1;
                way /= links;
            }
            loads.into_iter().max().unwrap()
        };
        f64::from((0..ways).map(fullest).sum::<u32>()) / f64::from(ways)
    }

    #[test]
    fn the_fullest_link_is_what_counting_all_ways_says() {
        for (flows, links) in [(1, 1), (1, 7), (2, 4), (5, 3), (6, 6), (8, 4), (7, 2)] {
            let (exact, counted) = (fullest(flows, links, 1), counted(flows, links));
            assert!((exact - counted).abs() < 1e-9, "{flows} on {links}: {exact} {counted}");
        }
    }

    #[test]
    fn many_flows_are_close_to_the_exact_sum_where_both_can_be_had() {
        let exact: f64 = (0..64).map(|most| 1.0 - none_above(most, 64, 16)).sum();
        let limit: f64 = (0..64).map(|most| 1.0 - poisson_up_to(most, 4.0).powi(16)).sum();
        assert!((exact - limit).abs() / exact < 0.05, "{exact} {limit}");
    }

    #[test]
    fn more_switches_more_collisions_and_more_flows_fewer_for_each() {
        assert!(fullest(16, 16, 8) > fullest(16, 16, 1));
        assert!(fullest(256, 16, 1) / 16.0 < fullest(16, 16, 1));
        assert_eq!(fullest(0, 16, 1), 0.0);
    }
}
