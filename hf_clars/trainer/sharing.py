"""What a trainer saves and shares: a model without pickles, its card, and exactly the run's files on the Hub."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, HfApi

from hf_clars.errors import ConfigError
from hf_clars.hub import push_run, write_card
from hf_clars.hub.push import explained
from hf_clars.hub.run_files import CARD
from hf_clars.trainer.card import gather_facts
from hf_clars.trainer.safe_checkpoints import SafeCheckpoints


class SharingTrainer(SafeCheckpoints):
    """A Trainer that saves no pickle, and pushes what `hf_clars.hub.shared_files` lists and nothing else."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save model, processor and arguments, and push the run if that was asked for.

        Args:
            output_dir: Where to; None: the run's folder.
            _internal_call: Whether somebody else pushes.
        """
        super().save_model(output_dir, True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Make the repository, or say before training why that cannot be.

        Args:
            token: Default None: the arguments' `hub_token`, or the one logged in with.
            private: Of a new repository. Default None: the arguments' `hub_private_repo`.

        Raises:
            HubError: The Hub refused, or cannot be reached.
        """
        with explained(self._repository_name(), HfApi().endpoint):
            super().init_hf_repo(token=token, private=private)

    def push_to_hub(  # type: ignore[override]  # Trainer promises CommitInfo, but gives the others too
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """Save the model and push the run: model, processor, card, layer rates, pictures and results, in one commit.

        A card that the folder has already is pushed as it is. Checkpoints, optimizer states, logs and arguments stay
        here.

        Args:
            commit_message: Title of the commit.
            blocking: False: push in the background.
            token: Default None: the arguments' `hub_token`, or the one logged in with.
            revision: Branch; default None: the arguments' `hub_revision`, or the main branch.
            private: Of a new repository. Default None: the arguments' `hub_private_repo`.
            kwargs: For `create_model_card`, if there is no card yet.

        Returns:
            The commit, or its future if not `blocking`; None on other processes than the first.

        Raises:
            ConfigError: `kwargs` are given, but there is a card.
            HubError: See `hf_clars.hub.push_run`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        folder = Path(str(self.args.output_dir))
        if not (folder / CARD).exists():
            self.create_model_card(**kwargs)
        elif kwargs:
            raise ConfigError(
                f"{folder} has a card already, and it is pushed as it is: {', '.join(kwargs)} would change nothing. "
                f"Edit {folder / CARD}, or remove it for a new one."
            )

        def push() -> CommitInfo:
            pushed = push_run(
                folder,
                self.hub_model_id or self._repository_name(),
                private=self.args.hub_private_repo if private is None else private,
                revision=self.args.hub_revision if revision is None else revision,
                message=commit_message or "End of training",
                token=self.args.hub_token if token is None else token,
            )
            assert pushed.commit is not None
            return pushed.commit

        return push() if blocking else HfApi().run_as_future(push)

    def create_model_card(
        self,
        language: str | None = None,
        license: str | None = None,
        tags: str | list[str] | None = None,
        model_name: str | None = None,
        finetuned_from: str | None = None,
        tasks: str | list[str] | None = None,
        dataset_tags: str | list[str] | None = None,
        dataset: str | list[str] | None = None,
        dataset_args: str | list[str] | None = None,
    ) -> None:
        """Write the card of an image classifier with what the trainer knows; of another model, Trainer's own draft.

        Args:
            language: Of the model; not for image classifiers.
            license: As the Hub lists them.
            tags: Not for image classifiers: their card has its own.
            model_name: Title; default None: the folder's name.
            finetuned_from: Hub id of the model that training started from.
            tasks: Not for image classifiers.
            dataset_tags: The data set's id on the Hub.
            dataset: Its name for people.
            dataset_args: Its configuration.

        Raises:
            HubError: See `hf_clars.hub.build_model_card`.
        """
        if getattr(self.model, "main_input_name", "pixel_values") != "pixel_values":
            super().create_model_card(
                language, license, tags, model_name, finetuned_from, tasks, dataset_tags, dataset, dataset_args
            )
        elif self.is_world_process_zero():
            dataset_id = _first(dataset_tags)
            facts = gather_facts(
                self,
                model_name=model_name or Path(str(self.args.output_dir)).resolve().name,
                dataset=_first(dataset) or dataset_id or "data that this card does not name",
                dataset_id=dataset_id,
                dataset_config=_first(dataset_args),
                base_model=finetuned_from,
                license=license,
            )
            write_card(Path(str(self.args.output_dir)), facts)

    def _repository_name(self) -> str:
        return self.args.hub_model_id or Path(str(self.args.output_dir)).resolve().name


def _first(given: str | list[str] | None) -> str | None:
    return given[0] if isinstance(given, list) and given else None if isinstance(given, list) else given
