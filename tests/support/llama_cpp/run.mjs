// Runs one job on a GGUF file in llama.cpp, on the CPU: `node run.mjs JOB.json ANSWER.json`.
//
// Job: {model, adapter?, texts?, special?, prompts?, maxTokens?, probe?}
//   texts: strings to tokenize; `special` says whether special tokens in them are read as such
//   prompts: token ids to answer greedily, up to maxTokens or the first token that ends an answer (which is kept)
//   probe: token ids; the answer is the probability of every token to come after them
// One thread: those of llama.cpp spin while they wait for each other, and two take minutes where others work, too.
// Answer: {tokens, answers, probabilities, bos, eos, addBos}

import {readFileSync, writeFileSync} from "node:fs";
import {getLlama} from "node-llama-cpp";

const [jobPath, answerPath] = process.argv.slice(2);
const job = JSON.parse(readFileSync(jobPath, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
const vocabOnly = !job.prompts && !job.probe;
const model = await llama.loadModel({modelPath: job.model, vocabOnly});
const answer = {bos: model.tokens.bos, eos: model.tokens.eos, addBos: model.tokens.shouldPrependBosToken};

if (job.texts)
    answer.tokens = job.texts.map((text) => model.tokenize(text, job.special ?? false));

if (!vocabOnly) {
    const lora = job.adapter ? {adapters: [{filePath: job.adapter, scale: 1}]} : undefined;
    const context = await model.createContext({contextSize: 1024, threads: 1, flashAttention: false, lora});
    const sequence = context.getSequence();
    answer.answers = [];
    for (const prompt of job.prompts ?? []) {
        await sequence.clearHistory();
        const tokens = [];
        for await (const token of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
            tokens.push(token);
            if (tokens.length >= (job.maxTokens ?? 16) || model.isEogToken(token))
                break;
        }
        answer.answers.push(tokens);
    }
    if (job.probe) {
        await sequence.clearHistory();
        const last = [job.probe.at(-1), {generateNext: {probabilities: true}}];
        const results = await sequence.controlledEvaluate([...job.probe.slice(0, -1), last]);
        answer.probabilities = Array.from(results.at(-1).next.probabilities.entries());
    }
}
writeFileSync(answerPath, JSON.stringify(answer));
process.exit(0);
