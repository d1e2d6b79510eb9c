"""Chat templates: conversations as texts, as transformers renders them, and what a template is given besides."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fasteagle_jax.errors import UserError
from fasteagle_jax.io.files import first_line
from fasteagle_jax.io.text import check_text
from fasteagle_jax.targets.messages import Message, plain_tools, short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast as Tokenizer

_MARKER = re.compile(r"\{%-?\s*generation\s*-?%\}")  # as transformers looks for it
# What a template is given by names of ChatOptions, or always.
_OWN = ("messages", "tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")
_GIVEN = {*_OWN, "documents", "raise_exception", "strftime_now", "namespace", "range", "dict", "loop", "self"}
_GIVEN |= {"bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token"}
_DIRECTIVES = "%-d %-m %-H %-I %-M %-S %-j %a %A %w %d %e %b %B %h %m %y %Y %H %I %p %M %S %f %j %U %W %V %G %u"
_DIRECTIVES += " %c %x %X %D %F %R %T %z %Z"


@dataclasses.dataclass(frozen=True)
class ChatOptions:
    """What a chat template is given beside messages; names and meanings are those of transformers and vLLM."""

    tools: Sequence[Mapping[str, Any]] | None = None  # as OpenAI's, each a JSON schema of a function
    chat_template: str | None = None  # the name of one of the tokenizer's, or a template; None: its own choice
    chat_template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # enable_thinking and the like
    add_generation_prompt: bool | None = None  # None: unless the final message is continued
    continue_final_message: bool = False  # leave the last message open, for its text to be continued
    date: str | None = None  # YYYY-MM-DD, for templates that write the day; None for the day on which they are used

    def __post_init__(self) -> None:
        if self.tools is not None:  # an empty list is none, as in OpenAI's requests
            object.__setattr__(self, "tools", plain_tools(self.tools, "tools") or None)
        if not isinstance(self.chat_template, str | None):
            raise UserError(f"chat_template is {short(self.chat_template)}: give a template or the name of one")
        kwargs = self.chat_template_kwargs
        if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
            raise UserError(f"chat_template_kwargs is {short(kwargs)}: give an object of the template's variables")
        if own := [name for name in _OWN if name in kwargs]:
            raise UserError(f"chat_template_kwargs has {own[0]}: give it beside them, by that name")
        for name in ("add_generation_prompt", "continue_final_message"):
            value = getattr(self, name)
            if not isinstance(value, bool) and (value is not None or name == "continue_final_message"):
                raise UserError(f"{name} is {short(value)}: give True or False")
        if self.date is not None:
            _day(self.date)
        if self.add_generation_prompt and self.continue_final_message:
            raise UserError("add_generation_prompt and continue_final_message are both True: give one of them")

    @property
    def opens_answer(self) -> bool:
        """Whether the prompt ends where a new answer begins."""
        opens = self.add_generation_prompt
        return not self.continue_final_message if opens is None else opens


PLAIN = ChatOptions()


def chat_template(tokenizer: Tokenizer, options: ChatOptions = PLAIN) -> str:
    """The template that is used, which writes the options' date if they have one; UserError if there is none.

    Of several by name it is the one that the options name, tool_use if there are tools, else the default.
    """
    chosen = _chosen_template(tokenizer, options)
    return chosen if options.date is None else _date_macro(options.date) + chosen


def _chosen_template(tokenizer: Tokenizer, options: ChatOptions) -> str:
    templates, wanted = tokenizer.chat_template, options.chat_template
    if isinstance(templates, dict):
        fitting = (wanted,) if wanted is not None else ("tool_use", "default") if options.tools else ("default",)
        for name in fitting:
            if name in templates:
                templates = templates[name]
                break
        else:
            if wanted is not None and "{" in wanted:
                return wanted
            names = ", ".join(map(str, templates)) or "nothing"
            missing = f"none of them {wanted if wanted is not None else 'default'}"
            remedy = "name one of them" if wanted is not None else "name one so, or add chat_template.jinja"
            raise UserError(f"the tokenizer's chat templates are named {names}, {missing}: {remedy}")
    elif wanted is not None:
        if "{" not in wanted:  # a name
            raise UserError(f"the tokenizer has no chat template named {wanted!r}, but at most one: leave it out")
        return wanted
    if not templates:
        raise UserError("the tokenizer has no chat template: use an instruct model or add chat_template.jinja")
    if not isinstance(templates, str):
        raise UserError(f"the tokenizer's chat template is a {type(templates).__name__}: give a text")
    return templates


def _day(date: Any) -> datetime.datetime:
    try:
        return datetime.datetime.strptime(date, "%Y-%m-%d")
    except (ValueError, TypeError):
        raise UserError(f"date is {short(date)}: give it as YYYY-MM-DD") from None


@functools.lru_cache(maxsize=8)
def _date_macro(date: str) -> str:
    """A beginning of templates after which they write this date on whatever day they are used.

    transformers gives templates a function of that name, and takes no other: a macro hides it.
    """
    day = _day(date)
    table = json.dumps({directive: day.strftime(directive) for directive in _DIRECTIVES.split()})
    return (
        "{%- macro strftime_now(format) -%}{%- set ns = namespace(text=format) -%}"
        "{%- for key, value in " + table + ".items() -%}{%- set ns.text = ns.text | replace(key, value) -%}"
        "{%- endfor -%}{{ ns.text }}{%- endmacro %}\n"  # whose newline transformers' environment trims
    )


def marks_answers(tokenizer: Tokenizer, options: ChatOptions = PLAIN) -> bool:
    """Whether the chat template marks answers by {% generation %}; False without a template."""
    try:
        return _MARKER.search(chat_template(tokenizer, options)) is not None
    except UserError:
        return False


def render_chats(
    tokenizer: Tokenizer,
    chats: Sequence[Sequence[Message]],
    add_generation_prompt: bool = False,
    options: ChatOptions = PLAIN,
) -> list[str]:
    """The texts of conversations under the chat template; UserError if there is none, or it refuses one of them.

    The options' own add_generation_prompt is left out of account.
    """
    texts: Any = _applied(
        tokenizer,
        chats,
        options,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=options.continue_final_message and not add_generation_prompt,
        tokenize=False,
    )
    return [check_text(text, "the conversation") for text in texts]


def marked_chats(
    tokenizer: Tokenizer, chats: Sequence[Sequence[Message]], options: ChatOptions = PLAIN
) -> tuple[Any, list[list[int]]]:
    """The encoding of conversations, and for each a mask of what {% generation %} marks, a number a token."""
    encoded: Any = _applied(
        tokenizer, chats, options, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    return encoded, list(encoded["assistant_masks"])


def _applied(tokenizer: Tokenizer, chats: Sequence[Sequence[Message]], options: ChatOptions, **how: Any) -> Any:
    """What apply_chat_template makes of conversations.

    A message of calls or thoughts may have no content. Templates that want a text (Qwen3's) get an empty one, as from
    vLLM, unless they then leave the calls out (DeepSeek-R1's).
    """
    arguments = _arguments(tokenizer, options) | how
    if not chats:
        return []
    plain = [[dict(message) for message in messages] for messages in chats]
    try:
        with template_errors():
            return tokenizer.apply_chat_template(plain, **arguments)
    except UserError:
        filled = [[{"content": "", **message} for message in messages] for messages in plain]
        if filled == plain:
            raise
        with contextlib.suppress(UserError), template_errors():  # the first error is the one to tell
            made = tokenizer.apply_chat_template(filled, **arguments)
            if all(writes_calls(tokenizer, messages, options) for messages in filled):
                return made
        raise


def writes_calls(tokenizer: Tokenizer, messages: Sequence[Message], options: ChatOptions = PLAIN) -> bool:
    """Whether the chat template writes the calls of tools that a conversation has; True if it has none."""
    if not any(message.get("tool_calls") for message in messages):
        return True
    bare = [{"content": "", **message} for message in messages]
    for message in bare:
        message.pop("tool_calls", None)
    try:
        with_calls, without = (render_chats(tokenizer, [each], False, options) for each in (messages, bare))
    except UserError:  # of a tool's answer without a call, for one
        return True
    return with_calls != without


def _arguments(tokenizer: Tokenizer, options: ChatOptions) -> dict[str, Any]:
    """What apply_chat_template is given by the options; UserError for a variable that the template does not read."""
    template = chat_template(tokenizer, options)
    if options.chat_template_kwargs:
        known = template_variables(template)
        if unknown := [name for name in options.chat_template_kwargs if name not in known]:
            there = ", ".join(sorted(known - _GIVEN)) or "none"
            raise UserError(f"the chat template has no variable {unknown[0]!r}: leave it out (it has: {there})")
    tools = None if options.tools is None else [dict(tool) for tool in options.tools]
    return {"chat_template": template, "tools": tools, **options.chat_template_kwargs}


@functools.lru_cache(maxsize=8)
def template_variables(template: str) -> frozenset[str]:
    """The names that a template reads and does not set itself; UserError if it is no template."""
    import jinja2
    from jinja2 import meta
    from jinja2.ext import Extension

    class Generation(Extension):
        """Reads {% generation %}, which transformers adds to the language."""

        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.Environment(extensions=[Generation, "jinja2.ext.loopcontrols"])
    with template_errors():
        return frozenset(meta.find_undeclared_variables(environment.parse(template)))


@contextlib.contextmanager
def template_errors() -> Iterator[None]:
    """A context that raises a chat template's errors, and those of the values that it works on, as UserError."""
    from jinja2 import TemplateError

    try:
        yield
    except UserError:
        raise
    except (MemoryError, RecursionError) as error:
        raise UserError(f"the chat template needs too much memory ({type(error).__name__}): use another one") from error
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise UserError(f"the chat template refuses this conversation: {first_line(error)}") from error


# --- what a file of answers depends on --------------------------------------------------------------------------


def template_digest(tokenizer: Tokenizer) -> str:
    """The SHA-256 of the chat template, or of all of them by name."""
    template: Any = tokenizer.chat_template
    text = template if isinstance(template, str) else json.dumps(template or "", sort_keys=True, default=str)
    return hashlib.sha256((text if template else "").encode()).hexdigest()
