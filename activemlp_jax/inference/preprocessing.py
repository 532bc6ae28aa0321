"""Find the preprocessing of a model's images, with or without a model card."""

from activemlp_jax.data.preprocessing import Preprocessing, ScenePreprocessing
from activemlp_jax.models.segmentor import Model
from activemlp_jax.weights.model_card import ModelCard, check_card
from activemlp_jax.weights.model_types import model_type


def preprocessing_for(model: Model, card: ModelCard | None) -> Preprocessing | ScenePreprocessing:
    """Return the card's preprocessing; without a card, that of the published models.

    Args:
      model: a classifier or a segmentation model.
      card: result of `read_card`, or None.

    Raises:
      ValueError: if the card belongs to another model; or if there is no card, and the model does
        not have as many classes as the published ones, so that its preprocessing is unknown.
    """
    if card is not None:
        check_card(card, model)
        return card.preprocessing
    published = model_type(model)
    if model.num_classes != published.num_classes:
        raise ValueError(
            f"the model has {model.num_classes} classes, not {published.dataset}'s "
            f"{published.num_classes}, so how to prepare its images has to be said: pass "
            "card=am.read_card(MODEL_DIR)"
        )
    preprocessing: Preprocessing | ScenePreprocessing = published.preprocessing()
    return preprocessing
