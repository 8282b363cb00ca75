"""Time and memory of the head's log-probabilities and of training steps, beside every peer.

Four rooms: `head` (the log-probability ops), `trainer` (whole models and training steps), `predict`
(the compiler's numbers and a roofline model, without the device) and `measure` (how time and memory
are taken, what is measured, how results are written).
"""
