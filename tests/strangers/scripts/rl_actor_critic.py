"""Policy gradient with a critic: two networks, two optimizers, an entropy bonus."""

import torch
import torch.nn as nn
from torch.distributions import Categorical

import skipscope as ss


def mlp(sizes, activation=nn.Tanh):
    layers = []
    for a, b in zip(sizes[:-1], sizes[1:]):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


torch.manual_seed(0)
actor, critic = mlp([4, 32, 32, 2]), mlp([4, 32, 32, 1])
actor_opt = torch.optim.Adam(actor.parameters(), lr=3e-4)
critic_opt = torch.optim.Adam(critic.parameters(), lr=1e-3)

with ss.watch({"actor": actor, "critic": critic}, [actor_opt, critic_opt]) as monitor:
    for _episode in range(8):
        obs = torch.randn(50, 4)
        dist = Categorical(logits=actor(obs))
        actions = dist.sample()
        returns = obs[:, 0] * (2.0 * actions - 1)
        values = critic(obs).squeeze(-1)
        advantage = (returns - values).detach()
        policy_loss = -(dist.log_prob(actions) * advantage).mean() - 0.01 * dist.entropy().mean()
        actor_opt.zero_grad()
        policy_loss.backward()
        actor_opt.step()
        value_loss = (values - returns).pow(2).mean()
        critic_opt.zero_grad()
        value_loss.backward()
        critic_opt.step()

assert monitor.verdict.state == "healthy", monitor.verdict
assert len(monitor.verdict.chains) == 2
