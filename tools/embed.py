"""From a trained model folder to the embedded model: scores on the packs' test rows, settings of use, model card.

    medseg train fmiseg --packs --out tiny_fmiseg
    python tools/embed.py tiny_fmiseg
"""
import json, shutil, sys
from pathlib import Path
import medseg_nb
from medseg_nb.core import write_json
from medseg_nb.evaluation.report import evaluate, presence_report
from medseg_nb.fmiseg.learner import Stage, packs_index
from medseg_nb.segment import load_segmenter

USE = dict(gate=True, lexicon=True)
SIZES, THRESHOLDS, ENOUGH = (256, 320, 384, 448, 512, 640, 768), (.3, .4, .5), 3

CARD = """# tiny_fmiseg

The small text-guided segmentation model of medseg_nb: `FMISeg(**TINY)` with the text tower of `tiny_clip`, {parameters:.1f} million parameters without the tower, fp16 safetensors.

- **Data**: the `train` rows of the sample packs {packs}, {images} images. All openly licensed (CC0, CC BY 3.0 or 4.0); sources and attribution stand in each pack's README.
- **Training**: `medseg train fmiseg --packs --out tiny_fmiseg`, then `python tools/embed.py tiny_fmiseg`: stages {stages}, AdamW with weight decay 0.02, average of the weights with decay 0.998; seed {seed}. {where} The first three stages still saw two radiographs with misplaced outlines, which have been left out since; the fourth, the sixth (seed 6) and the seventh (seed 7) started from the weights before them rounded to fp16, and the step to half the resolution (`detail`) came with the sixth.
- **Input**: images letterboxed to {size} pixels, or for some prompts to another size ({sizes}), values in [0, 1]; prompts of at most 24 tokens, known synonyms read as their first wording; maps emptied where the score of presence is below 0.5. The sizes, of 256 to 768, have the best mean Dice over the prompts on the `val` rows: one for each pack with three or more images there, one for all else; then the threshold, of 0.3, 0.4, 0.5.
- **Prompts it has met**: {prompts}, and their synonyms in `medseg_nb.wording`. Others give nothing sensible.

## Scores

On the packs' own test rows, patients apart where they are known; threshold {threshold}. Asked for a target of another kind of imaging, the mask covers less than 0.5% of the image in {empty:.0%} of {n_absent} pairs; the score of presence has an AUC of {auc:.3f}.

| prompt | images | Dice, mean over images | Dice, pooled |
| --- | --- | --- | --- |
{rows}

Small data, little computing: weak on thin vessels and small lesions. Research only, not for clinical use.

License: Apache-2.0, as the project.
"""

def choose(val):
    "On the val rows: the size with the best mean Dice over prompts, that of each pack with images enough, and the threshold."
    def by_prompt(t, **kw): return {p: o['per_image']['dice'] for p,o in evaluate(load_segmenter('tiny', threshold=t, **kw), val, surface=False).by('prompt').items()}
    found = {s: by_prompt(.4, size=s) for s in SIZES}
    best = lambda prompts: max(SIZES, key=lambda s: sum(found[s][p] for p in prompts))
    packs = {n: sorted(g['text'].unique()) for n,g in val.groupby('pack') if g['image'].nunique() >= ENOUGH}
    use = dict(size=best(list(found[SIZES[0]])), sizes={p: best(ps) for ps in packs.values() for p in ps})
    segmenters = {t: load_segmenter('tiny', threshold=t) for t in THRESHOLDS}
    for s in segmenters.values(): s.size, s.sizes = use.values()
    mean = lambda s: sum(o['per_image']['dice'] for o in evaluate(s, val, surface=False).by('prompt').values())
    return use | dict(threshold=max(THRESHOLDS, key=lambda t: mean(segmenters[t])))

def scores(segmenter, test):
    by = evaluate(segmenter, test, surface=False).by('prompt')
    rows = [dict(prompt=p, images=s['n'], dice_per_image=round(s['per_image']['dice'], 3), dice_pooled=round(s['pooled']['dice'], 3)) for p,s in by.items()]
    return sorted(rows, key=lambda r: -r['dice_per_image'])

def main(made, where='Two CPU cores, about five hours.'):
    made, home = Path(made), Path(medseg_nb.__file__).parent/'weights'/'tiny_fmiseg'
    config, df = json.loads((made/'config.json').read_text()), packs_index()
    test, train, val = (df[df['split'] == s].reset_index(drop=True) for s in ('test', 'train', 'val'))
    home.mkdir(parents=True, exist_ok=True)
    shutil.copy(made/'model.safetensors', home/'model.safetensors')
    shutil.copy(made/'history.csv', home/'history.csv')
    config = {k: v for k,v in config.items() if k != 'sizes'} | USE
    write_json(home/'config.json', config)
    config |= choose(val)
    write_json(home/'config.json', config)
    segmenter = load_segmenter('tiny')
    found, absent = scores(segmenter, test), presence_report(segmenter, test, n=200, seed=0)
    absent = {k: round(v, 3) for k,v in absent.items() if k != 'rows'}
    write_json(home/'config.json', config | dict(scores=found, absent=absent))
    stages = '; '.join(f"{s.episodes} episodes at {s.size} pixels{f' in windows from {s.load}' if s.load else ''}, peak rate {s.lr:g}" for s in (Stage(*o) for o in config['stages']))
    lines = '\n'.join(f"| {r['prompt']} | {r['images']} | {r['dice_per_image']:.3f} | {r['dice_pooled']:.3f} |" for r in found)
    (home/'README.md').write_text(CARD.format(parameters=sum(p.numel() for p in segmenter.model.net.parameters())/1e6, packs=', '.join(train['pack'].unique()),
        images=train['image'].nunique(), stages=stages, seed=config['seed'], where=where, size=config['size'], sizes=', '.join(f'{p} {n}' for p,n in config['sizes'].items()), threshold=config['threshold'],
        prompts=', '.join(sorted(train['text'].unique())), rows=lines, **absent))
    print(lines, absent)

if __name__ == '__main__': main(*sys.argv[1:])
