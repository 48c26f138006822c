"""What a stranger runs on an export of the format hf; `ser_ray.exporting.proof` runs it where ser_ray is not there.

python hf_predict.py DIRECTORY RECORDINGS.npz ANSWERS.npy [ADAPTER]
"""

from __future__ import annotations

import sys

import numpy as np
from transformers import pipeline


def main(directory: str, recordings: str, answers: str, adapter: str | None = None) -> None:
    """Answer every array of RECORDINGS.npz, 16 kHz, and write the probabilities (N, K) in the order of the labels.

    ``adapter``: a directory in PEFT's layout, to be merged into the encoder before.
    """
    ask = pipeline("audio-classification", model=directory, trust_remote_code=True, device="cpu")
    if adapter is not None:
        from peft import PeftModel

        ask.model.encoder = PeftModel.from_pretrained(ask.model.encoder, adapter).merge_and_unload()
    labels = [ask.model.config.id2label[number] for number in range(ask.model.config.num_labels)]
    rows = []
    with np.load(recordings) as waveforms:
        for number in range(len(waveforms.files)):
            found = {one["label"]: one["score"] for one in ask({"raw": waveforms[str(number)], "sampling_rate": 16000})}
            rows.append([found[label] for label in labels])
    np.save(answers, np.array(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
