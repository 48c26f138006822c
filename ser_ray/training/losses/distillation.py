"""Distillation (Hinton et al. 2015, arXiv 1503.02531, section 2): how far a student's probabilities are from those that
a teacher gives to the same utterance.

Both are softened by a temperature T, and their Kullback-Leibler divergence is multiplied by T^2: the gradient of the
softened probabilities falls with 1 / T^2, so that the weight beside the loss on the labels would depend on T.
"""

from __future__ import annotations

import torch


def distillation(logits_BK: torch.Tensor, probabilities_BK: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 KL(q_B || p_B), one loss per utterance, (B,): q the teacher's ``probabilities_BK`` and p the student's
    softmax of ``logits_BK``, both softened. The student's gradient is that of cross-entropy with q in place of labels.

    Probabilities are softened by log q / T: the logits that they are made of differ from log q by a constant.
    """
    log_q_BK = probabilities_BK.clamp(min=torch.finfo(probabilities_BK.dtype).tiny).log()
    log_q_BK = (log_q_BK / temperature).log_softmax(-1)
    log_p_BK = (logits_BK / temperature).log_softmax(-1)
    return temperature**2 * (log_q_BK.exp() * (log_q_BK - log_p_BK)).sum(-1)
