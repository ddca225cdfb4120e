"A SAM from boxes: a run that was cut goes on to the same weights, leaks are named, bad rows are told."
import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from medseg_nb.core import seeded
from medseg_nb.talk2medsam.model import load_sam
from medseg_nb.talk2medsam.pretrain import BoxEpisodes, load_squares, train_sam

def rows(folder, n=6, splits=('train', 'train', 'train', 'train', 'val', 'val')):
    rng, out = np.random.default_rng(0), []
    for i in range(n):
        m = np.hypot(*(np.mgrid[:40, :48] - rng.integers(12, 30, (2, 1, 1)))) < 8
        a = rng.integers(0, 60, (40, 48, 3)).astype(np.uint8) + 120*m[..., None].astype(np.uint8)
        Image.fromarray(a).save(folder/f'{i}.png'); Image.fromarray(m.astype(np.uint8)*255).save(folder/f'{i}_m.png')
        out.append(dict(image=f'{folder}/{i}.png', mask=f'{folder}/{i}_m.png', text='disc', split=splits[i], group=f'p{i}'))
    return pd.DataFrame(out)

def fresh():
    with seeded(0): return load_sam('tiny', pretrained=False)

def test_goes_on_where_it_was(tmp_path):
    df, kw = rows(tmp_path), dict(epochs=2, episodes=4, bs=2, device='cpu')
    whole, cut = fresh(), fresh()
    train_sam(df, tmp_path/'a', whole, progress=None, **kw)
    class Cut(Exception): pass
    def stop(line):
        if line.startswith('epoch 2'): raise Cut('cut')
    with pytest.raises(Cut): train_sam(df, tmp_path/'b', cut, progress=stop, **kw)
    assert (tmp_path/'b/sam.resume').exists() and not (tmp_path/'b/config.json').exists()
    again = fresh()
    train_sam(df, tmp_path/'b', again, progress=None, **kw)
    for a,b in zip(whole.state_dict().values(), again.state_dict().values()): assert torch.equal(a, b)
    assert not (tmp_path/'b/sam.resume').exists()

def test_refusals(tmp_path):
    df = rows(tmp_path)
    with pytest.raises(ValueError, match="'p0' in train and val"): train_sam(df.assign(group=['p0']*6), tmp_path/'a', fresh(), epochs=1, device='cpu')
    with pytest.raises(ValueError, match='none of 6 rows has a mask'): load_squares(df.assign(mask=''), 64)
    with pytest.raises(FileNotFoundError, match='gone.png'): load_squares(df.assign(image='gone.png'), 64)
    assert not (tmp_path/'a').exists()

def test_episodes_change_with_the_epoch(tmp_path):
    e = BoxEpisodes(load_squares(rows(tmp_path), 64), 5)
    first = e[0]
    e.epoch = 1
    assert not torch.equal(first[0], e[0][0])
    e.epoch = 0
    assert all(torch.equal(a, b) for a,b in zip(first, e[0]))
    for i in range(5):
        x, box, m = e[i]
        assert tuple(m.shape) == (1, 16, 16) and (box >= 0).all() and (box <= 63).all() and (box[:2] <= box[2:]).all() and 0 <= x.min() and x.max() <= 1
