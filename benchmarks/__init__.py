"""Time and memory of the head's log-probabilities and of training steps, beside every peer.

Five rooms: `head` (the log-probability ops), `trainer` (whole models and training steps), `gpu_kit`
(all of it in ten minutes on a GPU), `predict` (the compiler's numbers and a roofline model, without
the device) and `measure` (how time and memory are taken, what is measured, how it is written).
"""
