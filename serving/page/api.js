// The elements of the page, and requests to the server.

export const find = (id) => document.getElementById(id);

export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

export function say(error) { // an empty text removes the message
  find("problem").textContent = error.message ?? error;
}

// The response to a request. Throws an Error with the server's message.
export async function request(path, body, signal) {
  const headers = { "content-type": "application/json" };
  const key = sessionStorage.getItem("api_key");
  if (key) headers.authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(path, { method: "POST", headers, body: JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer.");
  }
  if (response.ok) return response;
  find("key").hidden = response.status !== 401;
  throw new Error((await response.json()).error.message);
}

export async function ask(path, body = {}) {
  return (await request(path, body)).json();
}

// The JSON of each event of a stream. Throws an Error for one that is an error.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const text = part.replace(/^data: /, "");
      if (text === "[DONE]") return;
      const event = JSON.parse(text);
      if (event.error) throw new Error(event.error.message);
      yield event;
    }
  }
}
