"Tile networks that other processes can import."
import os, signal, time
from dataclasses import dataclass
from pathlib import Path
import torch

class Dark:
    "How dark each cell of 8 pixels is."
    classes, name = ['background', 'dark'], 'dark'
    def __call__(self, x):
        p = torch.nn.functional.avg_pool2d(1 - x.mean(1, keepdim=True), 8)
        return torch.cat((1-p, p), 1)

@dataclass(frozen=True)
class Load:
    "Makes a network; the first process that comes to `kill` is killed in the middle of its work."
    kill: str = ''
    def __call__(self):
        net = Dark()
        return _Mortal(self.kill) if self.kill else net

class _Mortal(Dark):
    def __init__(self, kill): self.kill, self.n = Path(kill), 0
    def __call__(self, x):
        self.n += 1
        if self.n == 4:
            try: fd = os.open(self.kill, os.O_CREAT | os.O_EXCL)
            except FileExistsError: pass
            else: os.close(fd); os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(x)
