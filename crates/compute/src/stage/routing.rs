//! Which experts a token visits, and how what they make of it is weighted.

use model::{Experts, Scoring};

/// The choices of some tokens.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Routing {
    /// The experts of each token, `[tokens, per_token]`, the one with the highest score first.
    pub choices: Vec<u32>,
    /// The share of each choice in its token; the shares of a token add up to 1, but for those among
    /// all experts.
    shares: Vec<f32>,
    /// With sigmoids, those of the choices; with softmax of all, the shares of all experts,
    /// `[tokens, experts]`.
    scored: Vec<f32>,
    /// The copies of tokens in the order of their experts, by their place among the choices.
    pub order: Vec<u32>,
    /// Experts there are.
    count: usize,
    /// Copies that each expert gets from the tokens of each rank of the expert group,
    /// `[ranks, experts]`; from these tokens alone until the ranks have told each other.
    pub of_ranks: Vec<u32>,
}

impl Routing {
    /// From the scores of every expert for each token, and what is added to them for the choice.
    pub fn new(experts: &Experts, scores: &[f32], biases: &[f32]) -> Self {
        let (count, per_token) = (experts.count as usize, experts.per_token as usize);
        let mut routing = Self {
            choices: Vec::new(),
            shares: Vec::new(),
            scored: Vec::new(),
            order: Vec::new(),
            count,
            of_ranks: vec![],
        };
        for scores in scores.chunks_exact(count) {
            match experts.scoring {
                Scoring::Softmax => {
                    let chosen = highest(scores, per_token);
                    let highest = scores[chosen[0]];
                    let of = |expert: &usize| (scores[*expert] - highest).exp();
                    routing.choose(&chosen, &chosen.iter().map(of).collect::<Vec<_>>());
                }
                Scoring::SoftmaxOfAll => {
                    let all = softmax(scores);
                    let chosen = chosen_of(experts, all.clone(), 1);
                    routing.choices.extend(chosen.iter().map(|expert| *expert as u32));
                    routing.shares.extend(chosen.iter().map(|expert| all[*expert]));
                    routing.scored.extend(all);
                }
                Scoring::Sigmoid => {
                    let sigmoids: Vec<f32> =
                        scores.iter().map(|score| 1.0 / (1.0 + (-score).exp())).collect();
                    let biased = sigmoids.iter().zip(biases).map(|(s, bias)| s + bias);
                    let chosen = chosen_of(experts, biased.collect(), 2);
                    let of: Vec<f32> = chosen.iter().map(|expert| sigmoids[*expert]).collect();
                    routing.choose(&chosen, &of);
                    routing.scored.extend(of);
                }
            }
        }
        let mut order: Vec<u32> = (0..routing.choices.len() as u32).collect();
        order.sort_by_key(|copy| routing.choices[*copy as usize]); // stable: tokens stay in order
        routing.order = order;
        routing.of_ranks = routing.loads();
        routing
    }

    /// Of tokens of so many ranks that all visit the experts in turn, those of one rank.
    pub fn even(experts: &Experts, tokens: usize, ranks: usize) -> Self {
        let (count, copies) = (experts.count as usize, tokens * experts.per_token as usize);
        let choices = (0..copies as u32).map(|copy| copy % experts.count as u32).collect();
        let mut routing = Self {
            choices,
            shares: vec![1.0 / experts.per_token as f32; copies],
            scored: vec![0.5; tokens * count],
            order: (0..copies as u32).collect(),
            count,
            of_ranks: vec![],
        };
        routing.of_ranks = routing.loads().repeat(ranks);
        routing
    }

    /// Copies that each expert gets from these tokens.
    pub fn loads(&self) -> Vec<u32> {
        let mut loads = vec![0; self.count];
        self.choices.iter().for_each(|expert| loads[*expert as usize] += 1);
        loads
    }

    /// The experts that one of so many ranks holds.
    pub fn experts_of(&self, rank: usize, ranks: usize) -> std::ops::Range<usize> {
        let each = self.count / ranks;
        rank * each..(rank + 1) * each
    }

    /// Rows that an expert gets from the tokens of a rank.
    pub fn rows(&self, rank: usize, expert: usize) -> usize {
        self.of_ranks[rank * self.count + expert] as usize
    }

    /// Rows that an expert gets.
    pub fn rows_of(&self, expert: usize) -> usize {
        self.of_ranks.chunks_exact(self.count).map(|loads| loads[expert] as usize).sum()
    }

    fn choose(&mut self, chosen: &[usize], parts: &[f32]) {
        let sum: f32 = parts.iter().sum();
        for (expert, part) in chosen.iter().zip(parts) {
            self.choices.push(*expert as u32);
            self.shares.push(part / sum);
        }
    }

    /// The token of each copy, in the order of experts.
    pub fn tokens(&self, per_token: u64) -> Vec<u32> {
        self.order.iter().map(|copy| copy / per_token as u32).collect()
    }

    /// What each copy's result is multiplied by, in the order of experts.
    pub fn weights(&self, experts: &Experts) -> Vec<f32> {
        self.order.iter().map(|copy| self.shares[*copy as usize] * scale(experts)).collect()
    }

    /// The gradient of the scores from that of the weights, which are in the order of experts.
    pub fn scores_gradient(&self, experts: &Experts, weights: &[f32]) -> Vec<f32> {
        let (count, per_token) = (experts.count as usize, experts.per_token as usize);
        let mut shares = vec![0.0; weights.len()];
        for (copy, weight) in self.order.iter().zip(weights) {
            shares[*copy as usize] = weight * scale(experts);
        }
        let mut scores = vec![0.0; weights.len() / per_token * count];
        for (token, scores) in scores.chunks_exact_mut(count).enumerate() {
            let of_token = token * per_token..(token + 1) * per_token;
            let (given, own) = (&shares[of_token.clone()], &self.shares[of_token.clone()]);
            let mean: f32 = given.iter().zip(own).map(|(given, own)| given * own).sum();
            if experts.scoring == Scoring::SoftmaxOfAll {
                let all = &self.scored[token * count..(token + 1) * count];
                scores.iter_mut().zip(all).for_each(|(score, share)| *score = -share * mean);
                for (index, choice) in of_token.enumerate() {
                    scores[self.choices[choice] as usize] += own[index] * given[index];
                }
                continue;
            }
            for (index, choice) in of_token.enumerate() {
                // The softmax of the chosen scores; of a sigmoid s, the share s / sum has the
                // gradient (g - mean) / sum, and s itself s (1 - s).
                let slope = match experts.scoring {
                    Scoring::Sigmoid => own[index] * (1.0 - self.scored[choice]),
                    _ => own[index],
                };
                scores[self.choices[choice] as usize] = slope * (given[index] - mean);
            }
        }
        scores
    }
}

fn scale(experts: &Experts) -> f32 {
    match experts.scoring {
        Scoring::Softmax => 1.0,
        Scoring::SoftmaxOfAll | Scoring::Sigmoid => experts.scale,
    }
}

/// The places of the highest scores, highest first; of equal ones the first.
fn highest(scores: &[f32], count: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..scores.len()).collect();
    places.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    places.truncate(count);
    places
}

fn softmax(scores: &[f32]) -> Vec<f32> {
    let most = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exponentials: Vec<f32> = scores.iter().map(|score| (score - most).exp()).collect();
    let sum: f32 = exponentials.iter().sum();
    exponentials.into_iter().map(|exponential| exponential / sum).collect()
}

/// The experts with the highest scores, out of the groups whose highest scores, so many of each, have
/// the highest sums.
fn chosen_of(experts: &Experts, mut scores: Vec<f32>, of_group: usize) -> Vec<usize> {
    if experts.groups > 1 {
        let each = (experts.count / experts.groups) as usize;
        let best = |group: &[f32]| highest(group, of_group).iter().map(|place| group[*place]).sum();
        let groups: Vec<f32> = scores.chunks_exact(each).map(best).collect();
        let kept = highest(&groups, experts.groups_per_token as usize);
        for (group, scores) in scores.chunks_exact_mut(each).enumerate() {
            if !kept.contains(&group) {
                scores.fill(f32::NEG_INFINITY);
            }
        }
    }
    highest(&scores, experts.per_token as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sigmoid(groups: u64, groups_per_token: u64) -> Experts {
        let scoring = Scoring::Sigmoid;
        Experts { scoring, groups, groups_per_token, scale: 2.5, ..Experts::new(6, 2, 1) }
    }

    const SCORES: [f32; 12] = [0.3, -1.0, 2.0, 0.1, 1.9, -0.5, 1.0, 1.5, -2.0, 0.0, 0.4, 0.2];

    #[test]
    fn the_best_are_chosen_and_share_one() {
        let experts = Experts::new(6, 2, 1);
        let routing = Routing::new(&experts, &SCORES, &[]);
        assert_eq!(routing.choices, [2, 4, 1, 0]);
        assert_eq!(routing.loads(), [1, 1, 1, 0, 1, 0]);
        assert_eq!(routing.tokens(2), [1, 1, 0, 0]);
        let weights = routing.weights(&experts);
        assert!((weights[0] + weights[1] - 1.0).abs() < 1e-6);
        assert!((weights[2] / weights[3] - 0.1_f32.exp()).abs() < 1e-6);
    }

    #[test]
    fn of_all_experts_the_others_have_a_share_too() {
        let experts = Experts { scoring: Scoring::SoftmaxOfAll, ..sigmoid(3, 1) };
        let routing = Routing::new(&experts, &SCORES[..6], &[]);
        assert_eq!(routing.choices, [2, 3]); // the group of the best, whatever else is in it
        let sum: f32 = SCORES[..6].iter().map(|score| score.exp()).sum();
        let weights = routing.weights(&experts);
        assert!((weights[0] - 2.5 * 2_f32.exp() / sum).abs() < 1e-6, "{weights:?}");
        assert!((weights[1] - 2.5 * 0.1_f32.exp() / sum).abs() < 1e-6, "{weights:?}");
    }

    #[test]
    fn biases_change_the_choice_and_not_the_weights() {
        let experts = sigmoid(1, 1);
        let biases = [0.0, 0.0, -9.0, 0.0, 0.0, 9.0];
        let routing = Routing::new(&experts, &SCORES[..6], &biases);
        assert_eq!(routing.choices, [5, 4]);
        let of = |score: f32| 1.0 / (1.0 + (-score).exp());
        let expected = 2.5 * of(1.9) / (of(1.9) + of(-0.5));
        assert!((routing.weights(&experts)[0] - expected).abs() < 1e-6);
    }

    #[test]
    fn a_group_that_is_not_chosen_is_out() {
        // The second of the three groups of two has the best expert, but the others more together.
        let scores = [1.0, 1.0, 2.0, -9.0, 1.1, 1.1];
        let routing = Routing::new(&sigmoid(3, 1), &scores, &[0.0; 6]);
        assert_eq!(routing.choices, [4, 5]);
    }

    #[test]
    fn the_gradient_is_the_slope() {
        let of_all = Experts { scoring: Scoring::SoftmaxOfAll, ..sigmoid(3, 2) };
        for experts in [Experts::new(6, 2, 1), sigmoid(1, 1), of_all] {
            let biases = [0.0; 6];
            let routing = Routing::new(&experts, &SCORES, &biases);
            let pull: Vec<f32> = (0..4).map(|index| 0.3 + index as f32).collect();
            let pulled = |scores: &[f32]| -> f32 {
                let weights = Routing::new(&experts, scores, &biases).weights(&experts);
                weights.iter().zip(&pull).map(|(weight, pull)| weight * pull).sum()
            };
            let gradient = routing.scores_gradient(&experts, &pull);
            for (index, found) in gradient.iter().enumerate() {
                let moved = |by: f32| {
                    let mut scores = SCORES;
                    scores[index] += by;
                    pulled(&scores)
                };
                let slope = (moved(1e-2) - moved(-1e-2)) / 2e-2;
                assert!((found - slope).abs() < 2e-3, "{experts:?} {index}: {found} {slope}");
            }
        }
    }
}
