"""Object detection in torchvision's manner: in training mode the model takes targets and returns a dict of losses."""

import torch
import torch.nn as nn
import torch.nn.functional as F

import skipscope as ss


class Detector(nn.Module):
    def __init__(self, classes=3):
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(3, 16, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(16, 16, 3, 1, 1),
            nn.ReLU(),
        )
        self.lateral = nn.Conv2d(16, 16, 1)
        self.cls, self.box = nn.Conv2d(16, classes, 1), nn.Conv2d(16, 4, 1)

    def forward(self, images, targets=None):
        x = torch.stack(images)
        features = self.backbone(x)
        features = features + self.lateral(features)
        logits, boxes = self.cls(features), self.box(features)
        if not self.training:
            return [
                {"boxes": b.flatten(1).T, "scores": s.flatten(1).softmax(0)} for b, s in zip(boxes, logits)
            ]
        rows = [int(t["boxes"][0, 1]) // 4 for t in targets]
        columns = [int(t["boxes"][0, 0]) // 4 for t in targets]
        n = range(len(targets))
        return {
            "loss_classifier": F.cross_entropy(
                logits[n, :, rows, columns], torch.cat([t["labels"] for t in targets])
            ),
            "loss_box_reg": F.smooth_l1_loss(
                boxes[n, :, rows, columns], torch.cat([t["boxes"] for t in targets]) / 16
            ),
        }


torch.manual_seed(0)
images = [torch.randn(3, 16, 16) for _ in range(6)]
targets = [
    {"boxes": torch.tensor([[float(k), 2.0 * k, k + 4.0, 2.0 * k + 4]]), "labels": torch.tensor([k % 3])}
    for k in range(6)
]
model = Detector()
params = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.SGD(params, lr=0.005, momentum=0.9, weight_decay=0.0005)

objective = ss.objective(lambda model, batch: sum(model(*batch).values()), weight=lambda batch: len(batch[0]))
flow = ss.gradient_flow(model, (images, targets), objective)
with ss.watch(model, optimizer) as monitor:
    for _ in range(5):
        loss_dict = model(images, targets)
        losses = sum(loss for loss in loss_dict.values())
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()

assert flow.verdict.state == monitor.verdict.state == "healthy", (flow.verdict, monitor.verdict)
