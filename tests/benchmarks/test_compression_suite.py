"""The compression benchmark's counting: which queries there are, what a hit is, and how wide an interval is when queries come in clusters."""

from __future__ import annotations

import numpy as np

from benchmarks.suites.compression import World, clustered_interval, hits, overlap, query_concepts


def world() -> World:
    """Two galleries of three and two pictures; the second has none of the concept "c"."""
    concepts = [np.array(["a", "b", "c"]), np.array(["b", "a"])]
    asked = [("a", "an a"), ("b", "a b"), ("c", "a c")]
    right = [[np.flatnonzero(found == concept) for concept, _ in asked] for found in concepts]
    return World(
        pixels=np.zeros((5, 1)), tokens=np.zeros((3, 1), np.int32), galleries=[slice(0, 3), slice(3, 5)], texts=[text for _, text in asked], right=right,
        concepts=[concept for concept, _ in asked],
    )  # fmt: skip


def test_a_hit_is_a_right_first_picture_of_the_asked_gallery():
    text = np.eye(3, dtype=np.float32)
    image = np.eye(3, dtype=np.float32)[[0, 1, 2, 1, 0]]
    assert hits(world(), image, text).tolist() == [1, 1, 1, 1, 1]
    assert query_concepts(world()).tolist() == ["a", "b", "c", "a", "b"]
    swapped = image[[1, 0, 2, 3, 4]]
    assert hits(world(), swapped, text).tolist() == [0, 0, 1, 1, 1]


def test_overlap_of_the_same_embeddings_is_whole():
    rng = np.random.default_rng(0)
    made = World(
        pixels=np.zeros((60, 1)), tokens=np.zeros((8, 1), np.int32), galleries=[slice(0, 30), slice(30, 60)], texts=["t"] * 8,
        right=[[np.array([0])] * 8] * 2, concepts=["c"] * 8,
    )  # fmt: skip
    images, texts = ({"float32": rng.normal(size=(n, 8)), "other": rng.normal(size=(n, 8))} for n in (60, 8))
    assert overlap(made, images, texts, "float32", "float32") == 1.0
    assert overlap(made, images, texts, "other", "other") < 0.6


def test_intervals_know_that_queries_of_one_concept_go_together():
    rng = np.random.default_rng(0)
    of_concepts = rng.normal(size=50)
    values, clusters = np.repeat(of_concepts, 8), np.repeat(np.arange(50), 8)
    low, high = clustered_interval(values, clusters)
    assert low < values.mean() < high
    alone = clustered_interval(values, np.arange(len(values)))
    assert high - low > 2 * (alone[1] - alone[0])
    once = clustered_interval(of_concepts, np.arange(50))
    assert abs((high - low) - (once[1] - once[0])) < 0.15 * (high - low)
