"""PPO and GRPO: a policy answers prompts, is rewarded for what it says, and learns from that.

One iteration: rollout -> scores -> log-probabilities and values -> advantages -> epochs of mini-batches. Every role has
its own mesh. What they tell each other are tables on the host, [n answers, t tokens], which every rank of the job has
whole: so no number depends on how a role lies on the ranks.
"""
