"""Scores of two boxes (x0, y0, x1, y1) in float64, as the papers write them."""

import numpy as np


def area(b):
    return max(b[2] - b[0], 0) * max(b[3] - b[1], 0)


def iou(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    both = area([*np.maximum(a[:2], b[:2]), *np.minimum(a[2:], b[2:])])
    union = area(a) + area(b) - both
    return both / union if union else 0.0


def hull(a, b):
    return np.array([*np.minimum(a[:2], b[:2]), *np.maximum(a[2:], b[2:])], np.float64)


def giou(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    both = area([*np.maximum(a[:2], b[:2]), *np.minimum(a[2:], b[2:])])
    outer, union = area(hull(a, b)), area(a) + area(b) - both
    return iou(a, b) - (outer - union) / outer


def ciou(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    outer = hull(a, b)
    far = np.sum(((a[:2] + a[2:]) / 2 - (b[:2] + b[2:]) / 2) ** 2)
    diagonal = np.sum((outer[2:] - outer[:2]) ** 2)
    angle = lambda x: np.arctan2(x[2] - x[0], x[3] - x[1])
    v = 4 / np.pi**2 * (angle(a) - angle(b)) ** 2
    alpha = v / (1 - iou(a, b) + v) if v else 0.0
    return iou(a, b) - far / diagonal - alpha * v
