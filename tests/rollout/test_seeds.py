"""The seeds of rollouts: each of a run and each of another run is another one, and they stay those of older versions."""

from __future__ import annotations

from gspo_lightning.rollout.seeds import rollout_of_seed, rollout_seed


def test_no_two_rollouts_have_the_same_seed_and_it_tells_which_of_its_run_it_is():
    rollouts = (*range(50), 999_999, 1_000_002)
    made = [(rollout_seed(seed, rollout), rollout) for seed in range(6) for rollout in rollouts]
    assert len({seed for seed, _ in made}) == 6 * 52
    assert [rollout_of_seed(seed) for seed, _ in made] == [rollout for _, rollout in made]
    # A run that a newer version resumes draws what it would have drawn.
    assert (rollout_seed(0, 0), rollout_seed(0, 7), rollout_seed(2, 3)) == (0, 7, 2_000_009)
