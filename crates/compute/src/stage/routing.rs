//! Which experts a token visits, and how what they make of it is weighted.

use model::{Experts, Scoring};

/// The choices of some tokens.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Routing {
    /// The experts of each token, `[tokens, per_token]`, the one with the highest score first.
    pub choices: Vec<u32>,
    /// The share of each choice in its token; the shares of a token add up to 1.
    shares: Vec<f32>,
    /// With sigmoids, those of the choices.
    sigmoids: Vec<f32>,
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
            sigmoids: Vec::new(),
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
                Scoring::Sigmoid => {
                    let sigmoids: Vec<f32> =
                        scores.iter().map(|score| 1.0 / (1.0 + (-score).exp())).collect();
                    let chosen = chosen_by_sigmoids(experts, &sigmoids, biases);
                    let of: Vec<f32> = chosen.iter().map(|expert| sigmoids[*expert]).collect();
                    routing.choose(&chosen, &of);
                    routing.sigmoids.extend(of);
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
            sigmoids: vec![0.5; copies],
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
            for (index, choice) in of_token.enumerate() {
                // The softmax of the chosen scores; of a sigmoid s, the share s / sum has the
                // gradient (g - mean) / sum, and s itself s (1 - s).
                let slope = match experts.scoring {
                    Scoring::Softmax => own[index],
                    Scoring::Sigmoid => own[index] * (1.0 - self.sigmoids[choice]),
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
        Scoring::Sigmoid => experts.scale,
    }
}

/// The places of the highest scores, highest first; of equal ones the first.
fn highest(scores: &[f32], count: usize) -> Vec<usize> {
    let mut places: Vec<usize> = (0..scores.len()).collect();
    places.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    places.truncate(count);
    places
}

fn chosen_by_sigmoids(experts: &Experts, sigmoids: &[f32], biases: &[f32]) -> Vec<usize> {
    let mut scores: Vec<f32> = sigmoids.iter().zip(biases).map(|(s, bias)| s + bias).collect();
    if experts.groups > 1 {
        let each = (experts.count / experts.groups) as usize;
        let best_two = |group: &[f32]| highest(group, 2).iter().map(|place| group[*place]).sum();
        let groups: Vec<f32> = scores.chunks_exact(each).map(best_two).collect();
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
        for experts in [Experts::new(6, 2, 1), sigmoid(1, 1)] {
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
