"""Mixed precision on the CPU: autocast to bfloat16 and a GradScaler, clipping after unscale_."""

import torch
import torch.nn as nn

import skipscope as ss

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = nn.Sequential(*[nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(4)], nn.Linear(32, 5)).to(
    device
)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scaler = torch.amp.GradScaler(device, init_scale=1024.0)
x, y = torch.randn(64, 32, device=device), torch.randint(0, 5, (64,), device=device)

with ss.watch(model, optimizer) as monitor:
    for _ in range(6):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()

with torch.autocast(device, dtype=torch.bfloat16):
    flow = ss.gradient_flow(model, (x, y), nn.functional.cross_entropy, scaler=scaler)

assert monitor.verdict.state == flow.verdict.state == "healthy", (monitor.verdict, flow.verdict)
assert (monitor.history.loss_scale == 1024).all()
assert (monitor.history.total_before_clip < 10).all()  # without the scale
