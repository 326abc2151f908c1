// A text that a model writes: its tokens arrive in the chunks of a stream.
// A text is { chars, tokens, reason }. A token is that of tokens.js, with `offset`, the number of
// characters before it.
import { events, request } from "./api.js";

const ALTERNATIVES = 10;
export const ENDINGS = {
  length: "Ended at max_new_tokens.",
  stop: "Ended by itself.",
  stopped: "Stopped.",
  edited: "Edited.",
  failed: "Failed.",
};

// Continue `text` by v1/completions until it ends or `signal` is aborted.
// Calls `grew(first)` with the number of the first token that has changed.
export async function complete(text, body, signal, grew) {
  const base = text.chars.length;
  const read = ({ text: added, logprobs }) => {
    const tokens = logprobs.tokens.map((_, place) => ({
      offset: base + logprobs.text_offset[place],
      logprob: logprobs.token_logprobs[place],
      top: Object.entries(logprobs.top_logprobs[place]).sort(([, a], [, b]) => b - a),
    }));
    return { added, tokens };
  };
  const asked = { ...body, logprobs: ALTERNATIVES, truncate_prompt: true };
  await grow(text, "v1/completions", asked, signal, read, grew);
}

// The same by v1/chat/completions: the messages of `body` precede the text.
export async function answer(text, body, signal, grew) {
  const decoder = new TextDecoder();
  let offset = text.chars.length;
  const read = ({ delta, logprobs }) => {
    const tokens = (logprobs?.content ?? []).map(({ logprob, bytes, top_logprobs: top }) => {
      const token = { offset, logprob, top: top.map((one) => [one.token, one.logprob]) };
      offset += [...decoder.decode(Uint8Array.from(bytes), { stream: true })].length;
      return token;
    });
    return { added: delta.content ?? "", tokens };
  };
  const asked = { ...body, logprobs: true, top_logprobs: ALTERNATIVES };
  await grow(text, "v1/chat/completions", asked, signal, read, grew);
}

async function grow(text, path, body, signal, read, grew) {
  const { chars, tokens } = text;
  const nGiven = tokens.length;
  try {
    const response = await request(path, { ...body, stream: true }, signal);
    for await (const { choices: [choice] } of events(response)) {
      if (!choice) continue;
      const part = read(choice);
      const first = Math.max(nGiven, tokens.length - 1);
      chars.push(...part.added);
      tokens.push(...part.tokens);
      // A character can consist of several tokens, and the end of a text can be withheld.
      for (let index = first; index < tokens.length; index++) {
        const end = tokens[index + 1]?.offset;
        tokens[index].text = chars.slice(tokens[index].offset, end).join("");
      }
      text.reason = choice.finish_reason ?? text.reason;
      grew(first);
    }
  } catch (error) {
    text.reason = error.name === "AbortError" ? "stopped" : "failed";
    if (text.reason === "failed") throw error;
  }
}

// The beginning of a text up to the token `index`, with `choice` in its place.
export function withOther({ chars, tokens }, index, choice) {
  const { offset, top, text: instead } = tokens[index];
  const [, logprob] = top.find(([other]) => other === choice);
  const token = { offset, text: choice, logprob, top, isChosen: true };
  return {
    instead, choice,
    chars: [...chars.slice(0, offset), ...choice],
    tokens: [...tokens.slice(0, index), token],
  };
}

// Whether the text of a token can be sent: parts of a character, and special tokens, cannot.
export function canBeSent(token, { special }) {
  return !special.includes(token) && !/\\x[89a-f]/.test(token);
}

export function speed(nTokens, start) {
  const seconds = (performance.now() - start) / 1000;
  return `Wrote ${nTokens} ${nTokens === 1 ? "token" : "tokens"} in ${seconds.toFixed(1)} seconds.`;
}
