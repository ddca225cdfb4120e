"""Train the embedded encoder, score it, and put it into the package with its model card.

    python tools/embed_clip.py FOLDER

FOLDER keeps the run; one that was stopped goes on.
"""
import json, shutil, sys
from functools import partial
from pathlib import Path
import medseg_nb
from medseg_nb.clip.biomedclip import load_encoder
from medseg_nb.clip.tiny import TINY_RECIPE, clip_packs, retrieval_report, train_tiny_clip
from medseg_nb.clip.saliency import saliency_methods, score_saliency
from medseg_nb.core import write_json
from medseg_nb.data import read_index
from medseg_nb.packs import get_pack

CARD = """# tiny_clip

The small image and text encoder of medseg_nb: BiomedCLIP's classes with smaller arguments (`config.json`). {parameters:.1f} million parameters, fp16 safetensors.

- **Text tower**: 2 BERT layers of width 128, a vocabulary of 1,904 pieces made by the project from its own word list. First trained by `fit_paraphrases` (lesson `11a_clip.paraphrase`) on sentences written in the project, then with the images.
- **Image tower**: a ViT of 4 blocks of width 128, patches of 16 pixels, 4 register tokens, the mean of its patches as feature. Trained from nothing.
- **Data**: the `train` rows of the sample packs {packs}: {images} images with reports, and cuttings around masks with the masks' prompts. All openly licensed (CC0, CC BY 3.0 or 4.0); sources and attribution stand in each pack's README.
- **Training**: `python tools/embed_clip.py FOLDER`: `train_tiny_clip` with `TINY_RECIPE` ({recipe}), seed 0, two CPU cores.

## Scores

Test rows of the packs, patients apart where they are known. Retrieval, share of the first places that are right (chance: {chance}):

| pairs | number | image to text | text to image |
| --- | --- | --- | --- |
{retrieval}

Saliency of 'left lung' and 'right lung' on {n} chest radiographs: how often the peak lies in the lung that was asked for, and how the two maps correlate.

| method | peak in the lung | correlation |
| --- | --- | --- |
{saliency}

It has seen {images} images. Research only, not for clinical use. License: Apache-2.0, as the project.
"""

def sides(enc):
    df = read_index(get_pack('cxr_lungs')/'index.csv').query("split == 'test' and text in ['left lung', 'right lung']")
    scored = {k: score_saliency(fn, df) for k,fn in saliency_methods(enc).items()}
    return df['image'].nunique(), {k: (round(float(s['pointing'].mean()), 3), round(float(s['corr'].mean()), 3)) for k,s in scored.items()}

def main(folder):
    home = Path(medseg_nb.__file__).parent/'weights'/'tiny_clip'
    made = Path(folder)
    if not (made/'finetune.json').is_file(): train_tiny_clip(made, progress=partial(print, flush=True))
    df = clip_packs()
    enc = load_encoder(made)
    found, (n, maps) = retrieval_report(enc, df), sides(enc)
    for f in ('config.json', 'model.safetensors', 'history.csv', 'vocab.txt'): shutil.copy(made/f, home/f)
    config = json.loads((home/'config.json').read_text())
    write_json(home/'config.json', config | dict(scores=dict(retrieval=found.reset_index().to_dict('records'), saliency=maps)))
    train = df[df['split'] == 'train']
    recipe = ', '.join(f'{k} {v}' for k,v in TINY_RECIPE.items() if k != 'weights')
    rows = '\n'.join(f"| {k} | {r['pairs']:.0f} | {r['i2t@1']:.3f} | {r['t2i@1']:.3f} |" for k,r in found.iterrows())
    (home/'README.md').write_text(CARD.format(parameters=sum(p.numel() for p in enc.parameters())/1e6, packs=', '.join(train['pack'].unique()), recipe=recipe,
        images=train['image'].nunique(), retrieval=rows, chance=', '.join(f"{k} {v:.3f}" for k,v in found['chance'].items()), n=n,
        saliency='\n'.join(f'| {k} | {a:.3f} | {b:.3f} |' for k,(a, b) in maps.items())))
    print(found.round(3), maps)

if __name__ == '__main__': main(*sys.argv[1:])
