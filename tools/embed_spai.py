"""From a trained detector to the embedded one: weights as fp16 and a model card with the scores of its training.

    medseg spai-pairs --pack cxr_lungs --pack breast_ultrasound --pack fundus --pack nuclei --pack dermoscopy --pack endoscopy --pack mr_slices --out pairs
    medseg train spai --index pairs/pairs.csv --out tiny_spai
    python tools/embed_spai.py tiny_spai
"""
import json, shutil, sys
from pathlib import Path
import medseg_nb
from medseg_nb.spai.checkpoint import load_detector, save_detector

CARD = """# tiny_spai

The small detector of generated images of medseg_nb: `SpectralDetector(**tiny_config())`, {trained:,} trained parameters and a frozen ViT of {frozen:,} whose patch embedding is whitened and whose blocks are random, fp16 safetensors.

- **Data**: {real} real images of the sample packs cxr_lungs, breast_ultrasound, fundus, nuclei, dermoscopy, endoscopy and mr_slices ({groups} patients or slides), brought to 256 pixels, and their counterparts by the generators {seen} (train) of `medseg_nb.spai.generators`. All packs are openly licensed (CC0, CC BY 3.0 or 4.0); sources and attribution stand in each pack's README.
- **Training**: `medseg spai-pairs --pack ... --out pairs`, `medseg train spai --index pairs/pairs.csv --out tiny_spai`, `python tools/embed_spai.py tiny_spai`: {epochs} epochs, AdamW, seed {seed}, {minutes} minutes on two CPU cores. Calibration and threshold ({threshold:.3f}) are from the validation part.

## Scores

AUC on the test part, patients apart, each source's real images against their own counterparts; {unseen} were in no training.

| generator | AUC, matched | called generated |
| --- | --- | --- |
{rows}

{fpr:.0%} of {n_real} real test images are called generated.

**What it is not**: it has seen no image of a diffusion model, a GAN or any other published generator, and its verdict on one is worth nothing until it has been measured. Images whose fine detail was replaced by noise of the same power (`resynthesis`) look *more* real to it than real ones. JPEG, resizing and blur change what it sees. Train it on pairs of your own. Research only, not for clinical or forensic use.

License: Apache-2.0, as the project.
"""

def main(made):
    made, home = Path(made), Path(medseg_nb.__file__).parent/'weights'/'tiny_spai'
    model, said = load_detector(made), json.loads((made/'training.json').read_text())
    save_detector(model, home, half=True, **model.info)
    shutil.copy(made/'history.csv', home/'history.csv')
    test, train, rows = said['results']['test'], said['splits']['train'], said['generators']
    lines = '\n'.join(f"| {r['generator']} | {r['matched']:.3f} | {r['tpr']:.0%} |" for r in rows)
    count = lambda ps: sum(p.numel() for p in ps)
    (home/'README.md').write_text(CARD.format(
        trained=count(model.trainable()), frozen=count(model.vit.parameters()), real=sum(s['generators']['real'] for s in said['splits'].values()),
        groups=sum(s['groups'] for s in said['splits'].values()), seen=', '.join(sorted(set(train['generators']) - {'real'})), rows=lines,
        unseen=' and '.join(sorted(set(said['splits']['test']['generators']) - set(train['generators']))), epochs=said['settings']['epochs'], seed=said['settings']['seed'],
        minutes=round(said['seconds']/60), threshold=model.info['threshold'], fpr=test['operating_point']['fpr'], n_real=test['operating_point']['n_real']))

if __name__ == '__main__':
    if len(sys.argv) != 2: sys.exit(__doc__)
    main(sys.argv[1])
