"""Deep Q-learning: a replay buffer, a target network, a Huber loss, an environment in plain Python."""

import copy
import random
from collections import deque, namedtuple

import torch
import torch.nn as nn
import torch.nn.functional as F

import skipscope as ss

Transition = namedtuple("Transition", "state action reward next_state done")


class Corridor:
    def reset(self):
        self.place = 3
        return self.observe()

    def observe(self):
        return F.one_hot(torch.tensor(self.place), 8).float()

    def step(self, action):
        self.place = max(0, min(7, self.place + (1 if action else -1)))
        return self.observe(), float(self.place == 7), self.place in {0, 7}


class DQN(nn.Module):
    def __init__(self, n_obs=8, n_act=2):
        super().__init__()
        self.layer1, self.layer2, self.layer3 = nn.Linear(n_obs, 64), nn.Linear(64, 64), nn.Linear(64, n_act)

    def forward(self, x):
        return self.layer3(F.relu(self.layer2(F.relu(self.layer1(x)))))


random.seed(0)
torch.manual_seed(0)
env, memory = Corridor(), deque(maxlen=500)
policy_net = DQN()
target_net = copy.deepcopy(policy_net)
optimizer = torch.optim.AdamW(policy_net.parameters(), lr=1e-3, amsgrad=True)


def optimize_model():
    batch = Transition(*zip(*random.sample(memory, 32)))
    state, next_state = torch.stack(batch.state), torch.stack(batch.next_state)
    action, reward = torch.tensor(batch.action)[:, None], torch.tensor(batch.reward)
    done = torch.tensor(batch.done, dtype=torch.float)
    q = policy_net(state).gather(1, action).squeeze(1)
    with torch.no_grad():
        target = reward + 0.99 * (1 - done) * target_net(next_state).max(1).values
    loss = F.smooth_l1_loss(q, target)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_value_(policy_net.parameters(), 100)
    optimizer.step()


with ss.watch(policy_net, optimizer, flow_every=10) as monitor:
    state = env.reset()
    for t in range(100):
        action = random.randrange(2)
        next_state, reward, done = env.step(action)
        memory.append(Transition(state, action, reward, next_state, done))
        state = env.reset() if done else next_state
        if len(memory) >= 32:
            optimize_model()
        if t % 10 == 0:
            target_net.load_state_dict(policy_net.state_dict())

assert monitor.verdict.state == "healthy", monitor.verdict
assert len(monitor.history.steps) == 69
